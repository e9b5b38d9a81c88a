"""What the documents name is there: files, anchors, commands and their options."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from urllib.parse import unquote

import pytest
from documents import DOCUMENTS, ROOT, blocks, commands, headings, links

from lsmha_fast.cli import make_parser

FOLDERS = ("benchmarks", "csrc", "docs", "lsmha_fast", "scripts", "tests")
LAYERS = sorted(path.name for path in (ROOT / "lsmha_fast").iterdir() if path.is_dir())
SOURCE = (".py", ".cpp", ".cu", ".cuh", ".h", ".inl", ".md", ".sh", ".json")
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@documents
def test_links_resolve(document):
    missing = []
    for link in links(document):
        name, _, anchor = unquote(link).partition("#")
        if "://" in name:
            continue
        target = (document.parent / name).resolve() if name else document
        anchors = {slug(h) for h in headings(target)} if anchor and target.exists() else {""}
        if not target.exists() or anchor not in anchors:
            missing.append(link)
    assert missing == []


def files_named(text):
    """Paths of this repository in a piece of code; `<op>` stands for any name."""
    for word in re.findall(r"[\w./<>*{},-]+/[\w./<>*{},-]*[\w>*}]", text):
        first = word.partition("/")[0]
        if first in FOLDERS:
            yield word
        elif first in LAYERS and word.endswith(SOURCE):  # as seen from the package
            yield f"lsmha_fast/{word}"


def exists(pattern):
    """Whether a path, with `*`, `<op>` or `{a,b}` in it, names something."""
    braces = re.search(r"\{(.*?)\}", pattern)
    if braces:
        return all(exists(pattern.replace(braces[0], part)) for part in braces[1].split(","))
    pattern = re.sub(r"<\w+>", "*", pattern)
    return any(any(ROOT.glob(pattern + end)) for end in ("", ".*"))


@documents
def test_files_resolve(document):
    code = " ".join(block.text for block in blocks(document) if block.language != "python")
    missing = [name for name in files_named(code) if not exists(name)]
    assert missing == []


# what stands in documents for a value of a certain form
VALUES = {"$h": "8", "$s": "0"}


def check_lsmha(arguments, mention):
    parser = make_parser()
    if not mention:
        parser.parse_args([VALUES.get(a, a) for a in arguments])
        return
    for word in arguments:  # subcommand, action, and options that they have
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parser = below[0].choices.get(word, parser) if below else parser
        if word.startswith("--") and word not in parser._option_string_actions:
            pytest.fail(f"{parser.prog} has no {word}")
    if parser.prog == "lsmha":
        pytest.fail("no such subcommand")


def check_torchrun(arguments, mention):
    at = arguments.index("-m")
    assert arguments[at + 1] == "lsmha_fast"
    check_lsmha(arguments[at + 2 :], mention)


class Parsed(Exception):
    """The program has accepted its arguments; it goes no further."""


def check_python(arguments, mention):
    if arguments[:2] == ["-m", "pytest"]:
        check_pytest(arguments[2:], mention)
        return
    module = arguments[0] == "-m"
    name, *arguments = arguments[module:]
    path = ROOT / (name.replace(".", "/") + ".py" if module else name)
    assert path.is_file(), f"no {path}"
    if "parse_args(" not in path.read_text() or (mention and not arguments):
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args):
        parse(*args)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(str(ROOT if module else path.parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def check_bash(arguments, mention):
    subprocess.run(["bash", "-n", arguments[0]], cwd=ROOT, check=True)


def check_pytest(arguments, mention):
    """Files are there, and the names that -k selects occur in them."""
    paths = [ROOT / a for a in arguments if re.match(rf"({'|'.join(FOLDERS)})\b", a)]
    assert all(path.exists() for path in paths), paths
    text = "".join(
        file.name + file.read_text()
        for path in paths or [ROOT / "tests"]
        for file in ([path] if path.is_file() else path.rglob("*.py"))
    )
    selected = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    names = set(re.findall(r"\w+", selected)) - {"and", "or", "not"}
    assert all(name in text for name in names), names


def check_pip(arguments, mention):
    """Extras exist; a file of constraints, too."""
    known = EXTRAS.findall((ROOT / "pyproject.toml").read_text())
    for extra in re.findall(r"(?:lsmha_fast|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(known), extra
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()


EXTRAS = re.compile(r"^(\w+) = \[", re.MULTILINE)
CHECKS = {
    "lsmha": check_lsmha,
    "torchrun": check_torchrun,
    "python": check_python,
    "bash": check_bash,
    "pytest": check_pytest,
    "pip": check_pip,
}
# shell words, and programs whose arguments are not looked at
OTHERS = {"for", "do", "done", "ruff", "coverage"}


@documents
def test_commands_are_accepted(document, capsys):
    wrong = []
    for line, program, arguments, mention in commands(document, {*CHECKS, *OTHERS}):
        try:
            if program not in OTHERS:
                CHECKS[program](arguments, mention)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            said = capsys.readouterr().err or repr(error)
            wrong.append(f"{document.name}:{line}: {program} {shlex.join(arguments)}: {said}")
    assert wrong == [], "\n".join(wrong)
