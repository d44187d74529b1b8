"""Count how pages read: words a sentence, and numbers for each 100 words of prose.

    python tools/count_prose.py README.md docs/guides/*.md

Prose is what stands in paragraphs and lists. Code, tables, headings and the targets of links are
left out, and a piece of code inside a sentence is one word.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

LEFT_OUT = (
    re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^(?:    |\t)(?![-*] ).*$", re.MULTILINE),  # indented code
    re.compile(r"^\s*(?:\||#|!!!).*$", re.MULTILINE),  # tables, headings, notes
    re.compile(r"!\[[^\]]*\]\([^)]*\)"),  # pictures
)
ENDS = re.compile(r"(?<=[.!?:])[)*\"]*\s+(?=[\"(*A-Z0-9`\[])")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,.]*")


@dataclass(frozen=True)
class Count:
    """The sentences of a page, as words, and its numbers."""

    sentences: list[int]
    numbers: int

    @property
    def words(self) -> int:
        return sum(self.sentences)

    @property
    def words_a_sentence(self) -> float:
        return mean(self.sentences) if self.sentences else 0.0

    @property
    def numbers_per_100_words(self) -> float:
        return 100 * self.numbers / max(self.words, 1)


def count(text: str) -> Count:
    """The count of a page of Markdown."""
    for pattern in LEFT_OUT:
        text = pattern.sub("", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n", text, flags=re.MULTILINE)  # items of lists
    paragraphs = re.split(r"\n\s*\n", text)
    sentences = [
        len(words)
        for paragraph in paragraphs
        for sentence in ENDS.split(" ".join(paragraph.split()))
        if (words := [word for word in sentence.split() if re.search(r"\w", word)])
    ]
    return Count(sentences, len(NUMBER.findall(text)))


def main(pages: list[str]) -> None:
    print(f"{'words':>7}{'a sentence':>12}{'longest':>9}{'numbers in 100':>16}  page")
    for page in pages:
        found = count(Path(page).read_text(encoding="utf-8"))
        print(
            f"{found.words:7}{found.words_a_sentence:12.1f}{max(found.sentences, default=0):9}"
            f"{found.numbers_per_100_words:16.1f}  {page}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
