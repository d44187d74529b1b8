"""The classes of ImageNet-1k: WordNet ids in the order of their indices, names, and the subsets
-100, -R and -A.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from dpfast.config import ASSETS
from dpfast.errors import InputError
from dpfast.textfiles import lines, read_text

SETS = ("imagenet1k", "imagenet100")  # whose classes a recipe can name by one word
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ImageNet:
    """The classes of ImageNet-1k. ids: the 1,000 WordNet ids by index; names: their comma-separated
    synonyms; r, a: the ids of a subset each.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    r: frozenset[str]
    a: frozenset[str]

    def subset(self, name: str) -> frozenset[str]:
        """Returns the ids of "r", "a", or all of them for any other set."""
        return {"r": self.r, "a": self.a}.get(name, frozenset(self.ids))

    def ids_of(self, classes: Sequence[str]) -> tuple[str, ...] | None:
        """Returns the WordNet ids of a classifier's classes, by index; None when they are not
        classes of ImageNet.

        A class is called by its WordNet id, by all of its synonyms ("tench, Tinca tinca") or by the
        first one. Three names, "crane", "cardigan" and "maillot", belong to two classes each: where
        both are there, they are in ImageNet's order.

        Raises ``InputError`` where only one class of such a name is there, which may be either.
        """
        known = self._known()
        keys = [name.strip().lower() for name in classes]
        if not all(key in known for key in keys):
            return None
        taken: dict[str, int] = {}
        found = []
        for key in keys:
            choices = [
                i for i in known[key] if i.lower() == key or not self._named_fully(i, keys, key)
            ]
            place = taken.get(key, 0)
            if len(choices) != keys.count(key):
                raise InputError(
                    f"classes: {key!r} is the name of {len(choices)} classes of ImageNet "
                    f"({', '.join(choices)}) "
                    f"and comes {keys.count(key)} times; name the classes by their WordNet ids"
                )
            found.append(choices[place])
            taken[key] = place + 1
        return tuple(found)

    def strangers(self, classes: Sequence[str]) -> list[str]:
        """Returns the classes that are none of ImageNet's, by id or name."""
        known = self._known()
        return [name for name in classes if name.strip().lower() not in known]

    def _known(self) -> dict[str, list[str]]:
        """Maps the names that a class may have, in lower case, to the WordNet ids of such
        classes.
        """
        known: dict[str, list[str]] = {}
        for wordnet_id, name in zip(self.ids, self.names, strict=True):
            for key in dict.fromkeys((wordnet_id, name.lower(), name.split(",")[0].lower())):
                known.setdefault(key, []).append(wordnet_id)
        return known

    def _named_fully(self, wordnet_id: str, keys: list[str], key: str) -> bool:
        """Returns True if another of ``keys`` already is the full name of this class: "maillot,
        tank suit" beside "maillot".
        """
        name = self.names[self.ids.index(wordnet_id)].lower()
        return name != key and name in keys


def named(name: str) -> tuple[str, ...]:
    """Returns the names of the classes of "imagenet1k", or of "imagenet100" in the order of its
    list.
    """
    known = load()
    if name == "imagenet1k":
        return known.names
    listed = read_text(ASSETS / "imagenet" / "imagenet100.txt").split()
    return tuple(known.names[known.ids.index(wordnet_id)] for wordnet_id in listed)


@cache
def load() -> ImageNet:
    """Reads ``dpfast/assets/imagenet/classes.tsv``, whose source its README names."""
    listed = lines(read_text(ASSETS / "imagenet" / "classes.tsv"))[1:]
    rows = [line.split("\t") for line in listed]
    return ImageNet(
        ids=tuple(row[0] for row in rows),
        names=tuple(row[2] for row in rows),
        r=frozenset(row[0] for row in rows if "r" in row[1]),
        a=frozenset(row[0] for row in rows if "a" in row[1]),
    )
