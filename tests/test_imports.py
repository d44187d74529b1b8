"""The rooms of the package stand on the floors of CONTRIBUTING's map, and imports point down.

Every import counts: at the top of a module, inside a function, and for the type checker alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dpfast").rglob("*.py"))
}


def floors() -> dict[str, int]:
    """The floor of each room, of the lines "7  feed learn  what they do" of CONTRIBUTING's map."""
    lines = re.findall(r"^ +(\d+)  (\w+(?: \w+)*)  ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    return {room: int(floor) for floor, rooms in lines for room in rooms.split()}


def imports(module: str) -> Iterator[str]:
    """The modules of the package that ``module`` names in an import."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            known = name if name in MODULES else name.rpartition(".")[0]
            if known in MODULES and known != module:
                yield known


ARROWS = {module: set(imports(module)) for module in MODULES}


def room(module: str) -> str:
    """The folder or the module right below the package; "dpfast" for the package's root."""
    return module.split(".")[1] if "." in module else module


def reached(module: str) -> set[str]:
    """The modules that ``module`` imports, and those that they import."""
    found: set[str] = set()
    ahead = [module]
    while ahead:
        new = ARROWS[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_the_map_names_every_room_and_no_other() -> None:
    assert set(floors()) == {room(module) for module in MODULES}


def test_imports_between_rooms_point_down() -> None:
    floor = floors()
    wrong = {
        f"{module} -> {other}"
        for module, others in ARROWS.items()
        for other in others
        if room(module) != room(other) and floor[room(module)] <= floor[room(other)]
    }
    assert not wrong


def test_no_module_imports_itself_by_a_detour() -> None:
    assert not {module for module in MODULES if module in reached(module)}
