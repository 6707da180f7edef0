"""The commands that README and docs show, as they stand in blocks of code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [
    str(path.relative_to(ROOT))
    for pattern in ("docs/*.md", "docs/tutorials/*.md", "tools/*/README.md")
    for path in ROOT.glob(pattern)
]


@dataclass(frozen=True)
class Shown:
    """One command, and where it stands."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The words after `fvae`, as a shell makes them, up to a comment or a pipe."""
        words = shlex.split(self.text, comments=True)
        return words[1 : words.index("|") if "|" in words else None]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def shown(pages: list[str] | None = None, program: str = "fvae") -> list[Shown]:
    """Return all commands of a program in the pages' blocks of code, indented ones alone.

    A backslash at the end of a line goes on with the next one.
    """
    found = []
    for page in sorted(pages or PAGES):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if re.match(rf"    {program} [a-z]", line):
                text = line.strip()
                following = number
                while text.endswith("\\"):
                    text = text[:-1] + lines[following].strip()
                    following += 1
                found.append(Shown(page, number, text))
    return found
