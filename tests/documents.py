"""The documents of the repository: their code blocks, links, names of files and commands."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Collection, Iterator
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


def links(document: Path) -> list[str]:
    """Targets of links and pictures."""
    tokens = PARSER.parse(document.read_text())
    attributes = [child.attrs for token in tokens for child in token.children or []]
    return [a[name] for a in attributes for name in ("href", "src") if name in a]


def headings(document: Path) -> list[str]:
    """Texts of the headings."""
    tokens = PARSER.parse(document.read_text())
    pairs = itertools.pairwise(tokens)
    return [inner.content for token, inner in pairs if token.type == "heading_open"]


class Command(NamedTuple):
    """A program with its arguments: a line to be typed, or only a mention, between backticks."""

    line: int
    program: str
    arguments: list[str]
    mention: bool


def commands(document: Path, programs: Collection[str]) -> Iterator[Command]:
    """All commands of the blocks that begin with one of these programs, and mentions of them.

    Environment variables, comments and the path of the venv are left out.
    """
    for block in blocks(document):
        found = []
        if block.language in (None, "", "bash"):
            for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines()):
                found += [(block.line + number, words) for words in _simple_commands(line)]
        if found and found[0][1][0] in programs:
            mention = block.language is None
            for line, (program, *arguments) in found:
                if not mention or (program in programs and arguments):
                    yield Command(line, program, arguments, mention)


def _simple_commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    command: list[str] = []
    try:
        tokens = list(lexer)
    except ValueError:  # a quotation mark alone: not a command
        return
    for token in [*tokens, ";"]:
        if set(token) <= set("&;|"):
            if command:
                yield command
            command = []
        elif command or not re.fullmatch(r"\w+=.*", token):
            command.append(token.removeprefix(".venv/bin/") if not command else token)
