"""Hooks of mkdocs.yml: what a page says for GitHub becomes what the site shows.

A link to a file outside of docs is relative, as GitHub follows it. The site shows that file as a
page of its own below ``source/``. A directive of mkdocstrings stands in a comment, which GitHub
hides.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)(\[[^\]]*\])\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")
FENCE = re.compile(r"^(`{3,}).*?^\1", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".hpp": "cpp", ".toml": "toml", ".sh": "bash"}
SOURCE = "source"  # the folder of the site that shows files outside of docs


def outside(page: str, target: str) -> str | None:
    """Returns the path below the root that a page's link leads to, or None inside of docs.

    page: below docs, "guides/extend.md"; target: relative to it, "../../examples/callback.py".
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside of docs that some page links to."""
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            uri = f"{SOURCE}/{path}.md"
            if path and (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links out of docs to the pages below ``source/`` and turns directives on."""
    here = page.file.src_uri
    if here.startswith(f"{SOURCE}/"):
        return markdown

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match.groups(default="")
        path = outside(here, target)
        if not path or not (ROOT / path).is_file():
            return match[0]  # strict mode says what is missing
        up = posixpath.relpath(f"{SOURCE}/{path}.md", posixpath.dirname(here) or ".")
        return f"{text}({up}{anchor})"

    if here == "reference/api.md":
        markdown = re.sub(r"\[`(\w+)`\]\([^)]*\.py\)", r"[`\1`](#dpfast.\1)", markdown)
    markdown = re.sub(r"^<!-- (::: [\w.]+) -->$", r"\1\n", markdown, flags=re.MULTILINE)
    return LINK.sub(led, markdown)


def _shown(path: str) -> str:
    """The Markdown of the page that shows a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):  # whose links hold at its own place, not here
        return LINK.sub(r"\1", text)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"# {path}\n\n{ticks}{LANGUAGES.get(Path(path).suffix, '')}\n{text}{ticks}\n"
