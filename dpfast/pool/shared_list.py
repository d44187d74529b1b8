"""``SharedList``: an immutable sequence that grows without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class SharedList(Sequence[Item]):
    """The first items of a list that it shares with what has grown out of it; none of them ever
    changes.

    One thread at a time grows; any number read meanwhile.
    """

    __slots__ = ("_items", "_size")

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._items = list(items)
        self._size = len(self._items)

    @property
    def newest(self) -> bool:
        """Whether nothing has grown out of it yet, so that ``plus`` copies nothing."""
        return len(self._items) == self._size

    def plus(self, item: Item) -> SharedList[Item]:
        """With ``item`` at the end: in constant time, amortised, of the newest; of another by a
        copy.
        """
        grown: SharedList[Item] = SharedList.__new__(SharedList)
        grown._items = self._items if self.newest else self._items[: self._size]
        grown._items.append(item)
        grown._size = self._size + 1
        return grown

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Item]:
        return (self._items[i] for i in range(self._size))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        places = range(self._size)[index]
        return (
            self._items[places]
            if isinstance(places, int)
            else tuple(self._items[i] for i in places)
        )
