"""The documents of the repository: their code blocks, links, names of files and commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
PARSER = MarkdownIt().enable("table")


class Block(NamedTuple):
    """A fenced block of code, or what stands between backticks (language None)."""

    document: Path
    line: int
    language: str | None
    text: str


def blocks(document: Path) -> list[Block]:
    """All code of a document, in order."""
    found = []
    for token in PARSER.parse(document.read_text()):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            found.append(Block(document, line + 1, token.info.strip(), token.content))
        elif token.type == "code_block":
            found.append(Block(document, line, "", token.content))
        for child in token.children or []:
            if child.type == "code_inline":
                found.append(Block(document, line, None, child.content))
    return found
