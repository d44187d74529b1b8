"""The error messages and warnings of the package, as its code says them: docs/reference/errors.md.

tools/write_reference.py calls this. What a message does not say itself, its cause, stands in
tools/error_causes.toml.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

from dpfast.textfiles import read_text

PACKAGE = Path(__file__).parents[1] / "dpfast"
CAUSES = Path(__file__).with_name("error_causes.toml")
WRITTEN = (
    "<!-- Written by tools/write_reference.py: change tools/error_causes.toml or the code. -->"
)
GAP = "..."
ERROR = r"[A-Z]\w+Error"
# Functions that put what a message is about before the words that they are called with.
MAKERS = {
    "self.error",
    "folder.error",
    "self.lacking",
    "folder.lacking",
    "refuse",
    "self._refusing",
}
WARNINGS = {"warn": "", "unsaved": ": ERROR; ..."}
# Words by which a message says what would be right.
SAYS_IT = re.compile(
    r"expected|; |\bsay |\buse |choose|must |needs? |lacks|\bhas no\b|no such|at least|at most"
    r"|has neither|stands? in it twice|is not installed|takes no"
)
# Messages whose words come from another process, or through a collective.
ELSEWHERE = {
    ("parallel/heartbeat.py", "words"): ["rank RANK of SIZE has ended: ERROR"],
    ("practice/disk.py", "refusal"): [
        "out = OUT: WHEN needs ... of disk (COUNT samples ..., checkpoints ...), ... are free; "
        "make room and go on with --resume"
    ],
    ("parallel/ranks.py", "words"): ["rank RANK of SIZE: a collective broke off: ERROR"],
}
PAGE = f"""{WRITTEN}

# Error messages

Every error and warning of dpfast's own, by the part of the package that says it. Copy the fixed
words of a message into the search, without the values: in the table, names in capitals and `...`
stand for what differs. An empty cell means that the message itself says what would be right.
Common troubles, with what to do, are in [troubleshoot](../guides/troubleshoot.md).

A message without a word in brackets is an `InputError`: what a caller got wrong. It is a
`ValueError`, and on the command line it is one line and exit code 2. A message that begins with
`rank 3: ` comes from that rank.

"""


class Message(NamedTuple):
    """A message: the file that says it, the kind of error, and its form, in which names in
    capitals and "..." stand for what differs.
    """

    file: str
    kind: str
    form: str


class Unread(NamedTuple):
    """A message whose words are not found where it is raised."""

    file: str
    line: int
    source: str


def messages() -> tuple[list[Message], list[Unread]]:
    """All messages of the package, in the order of its files, and those that cannot be read."""
    found: list[Message] = []
    unread: list[Unread] = []
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        modules[file[:-3].removesuffix("/__init__")] = _Module(file, ast.parse(read_text(path)))
    for module in modules.values():
        file, module.others = module.file, modules
        for call, function, name in module.calls:
            maker = not re.fullmatch(ERROR, name) and name not in WARNINGS
            kind = "warning" if name in WARNINGS else "InputError" if maker else name
            source = ast.unparse(call.args[0])
            # the words come last where a function puts others before them, or an OSError its number
            told = call.args[::-1] if maker or name == "OSError" else call.args[:1]
            heard = [module.forms(each, function) for each in told]
            forms = next(filter(None, heard), [] if maker or [] in heard else None)
            if forms is None and (file, source) in ELSEWHERE:
                forms = ELSEWHERE[file, source]
            elif forms is None:
                unread.append(Unread(file, call.lineno, source))
            for form in forms or ():
                if re.search(r"[a-z]{3}", form):
                    form = " ".join(form.split()) + WARNINGS.get(name, "")
                    found.append(Message(file, kind, form))
    return found, unread


class _Module:
    """The functions of a file, and the strings that its names can stand for."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self.file = file
        self.named: dict[str, list[ast.FunctionDef]] = {}
        self.imported: dict[str, str] = {}
        self.others: dict[str, _Module] = {}
        # each that makes an error or warns: the call, its function, the last part of its name
        self.calls: list[tuple[ast.Call, ast.AST, str]] = []
        self.constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        }
        self._enter(tree, tree)

    def _enter(self, node: ast.AST, function: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            self.named.setdefault(node.name, []).append(node)
            function = node
        elif isinstance(node, ast.ImportFrom) and node.module:
            home = node.module.removeprefix("dpfast.").replace(".", "/")
            self.imported |= {name.name: home for name in node.names}
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            self._called(node.exc, function, raised=True)
        elif isinstance(node, ast.Call):
            self._called(node, function, raised=False)
        for child in ast.iter_child_nodes(node):
            self._enter(child, function)

    def _called(self, call: ast.Call, function: ast.AST, *, raised: bool) -> None:
        func = call.func
        name = getattr(func, "attr", getattr(func, "id", ""))
        error = re.fullmatch(ERROR, name)
        # other functions make errors where they are raised, or are known to
        if call.args and (
            (error or name in WARNINGS or ast.unparse(func) in MAKERS)
            if not raised
            else name and not error and ast.unparse(func) not in MAKERS
        ):
            self.calls.append((call, function, name))

    def forms(self, node: ast.AST, function: ast.AST, depth: int = 0) -> list[str] | None:
        """The texts that an expression can be, [] for another's message, None where unknown."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            texts = [""]
            for value in node.values:
                texts = [text + part for text in texts for part in self._parts(value)]
            glued = [re.sub(r"\0[A-Z_]+\0(?=[a-z])", GAP, text) for text in texts]
            return [text.replace("\0", "") for text in glued]
        if isinstance(node, ast.IfExp):
            return self._all([node.body, node.orelse], function, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self.forms(n, function, depth) for n in (node.left, node.right))
            return [a + b for a in left or [GAP] for b in right or [GAP]]
        if depth > 3:
            return None
        if isinstance(node, ast.BoolOp):
            found = [self.forms(value, function, depth + 1) for value in node.values]
            return [form for each in found for form in each or ()] or None
        if isinstance(node, ast.Name):
            return self._assigned(node.id, function, depth + 1)
        if isinstance(node, ast.Attribute):  # of an error that is told once more
            return [] if node.attr == "message" else None
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("str", "first_line"):
                return []
            if name == "format" and isinstance(node.func, ast.Attribute):
                texts = self.forms(node.func.value, function, depth + 1) or []
                return [text.replace("{}", GAP) for text in texts]
            home = self if name in self.named else self.others.get(self.imported.get(name, ""))
            returns = [
                (each.value, made)
                for made in (home.named.get(name, ()) if home else ())
                for each in ast.walk(made)
                if isinstance(each, ast.Return) and each.value is not None
            ]
            found = [home.forms(value, made, depth + 1) for value, made in returns if home]
            return [f for each in found for f in each or ()] or None
        return None

    def _parts(self, node: ast.expr) -> list[str]:
        """What may stand for a part of an f-string."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        assert isinstance(node, ast.FormattedValue)
        if isinstance(node.value, ast.IfExp):
            either = (node.value.body, node.value.orelse)
            words = [each.value for each in either if isinstance(each, ast.Constant)]
            if len(words) == 2:
                return list(map(str, words))
        return [self._named(node)]

    def _named(self, node: ast.FormattedValue) -> str:
        """What stands for a value: a constant, or its name in capitals between nulls."""
        value = node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("str", "shown", "_word"):
            value = value.args[0]
        word = ast.unparse(value) if isinstance(value, ast.Name | ast.Attribute) else ""
        last = word.rpartition(".")[2]
        if last.isupper():
            home = word.rpartition(".")[0] or last
            elsewhere = self.others.get(f"{self.imported.get(home, '')}/{home}".strip("/"))
            for each in (self, self.others.get(self.imported.get(home, "")), elsewhere):
                if each and last in each.constants:
                    return each.constants[last]
            return GAP
        return f"\0{last.strip('_').upper()}\0" if len(last) > 1 else GAP

    def _assigned(self, name: str, function: ast.AST, depth: int) -> list[str] | None:
        values = []
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                targets = targets or [node.target]  # type: ignore[union-attr]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets) and node.value:
                    values.append(node.value)
        arguments = function.args if isinstance(function, ast.FunctionDef) else None
        if arguments and not values:
            given = [each.arg for each in (*arguments.args, *arguments.kwonlyargs)]
            return [] if name in given else None  # its callers' words, found where they call
        return self._all(values, function, depth) if values else None

    def _all(self, nodes: list[ast.expr], function: ast.AST, depth: int) -> list[str] | None:
        found = [self.forms(node, function, depth) for node in nodes]
        return None if None in found else [form for each in found for form in each or ()]


def causes() -> dict[str, dict[str, Any]]:
    """The tables of tools/error_causes.toml: rooms, others' messages, causes by a part of them."""
    return tomllib.loads(read_text(CAUSES))


def cause(form: str, known: dict[str, str]) -> str:
    """The cause of a message: that of the first part which is in it; empty where none is."""
    return next((text for part, text in known.items() if part in form), "")


def page() -> str:
    """The text of docs/reference/errors.md."""
    told, rooms = causes(), dict[str, dict[str, Message]]()
    for each in messages()[0]:
        room = each.file.partition("/")[0].removesuffix(".py").replace("__init__", "dpfast")
        rooms.setdefault(room, {}).setdefault(each.form, each)
    text = PAGE
    for room, found in rooms.items():
        text += f"## {room}\n\n{told['rooms'][room]}\n\n| message | cause |\n|---|---|\n"
        text += "".join(
            f"| {said} | {why} |\n" for said, why in told["foreign"].get(room, {}).items()
        )
        for form, each in found.items():
            code = form.replace("|", "\\|").replace("`", "'")
            kind = "" if each.kind in ("InputError", "RecipeError") else f" ({each.kind})"
            text += f"| `{code}`{kind} | {cause(form, told['causes'])} |\n"
        text += "\n"
    return text.rstrip() + "\n"
