"""setup.py: metadata needs nothing, LSMHA_BUILD is obeyed, what is missing is said in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lsmha_fast/_version.py").read_text()).group(1)

# stands in for an environment without torch, such as pip's isolated build
BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Block())
"""
# what setup() would be told, without running it
SHOW = """
import runpy, sys, setuptools
setuptools.setup = lambda **k: print("extensions:", [e.name for e in k.get("ext_modules", [])])
sys.argv = ["setup.py"]
runpy.run_path("setup.py", run_name="__main__")
"""
RUN = "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"


def python(code, **env):
    """Run code in the source folder; environment variables given as None are unset."""
    full = {k: v for k, v in {**os.environ, "LSMHA_BUILD": None, **env}.items() if v is not None}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True)


def test_version_without_torch():
    done = python(BLOCK_TORCH + RUN)
    assert done.returncode == 0, done.stderr
    said, version = done.stdout.splitlines()
    assert version == VERSION
    assert said.startswith("lsmha_fast: no native kernels: torch cannot be imported")
    assert "pip install --no-build-isolation ." in said


def test_skip_builds_nothing_and_does_not_look_for_torch():
    check = "assert 'torch' not in sys.modules"
    done = python(SHOW + check, LSMHA_BUILD="skip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "lsmha_fast: no native kernels: LSMHA_BUILD=skip",
        "extensions: []",
    ]


def test_auto_without_a_compiler_says_so_and_goes_on():
    done = python(SHOW, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    said, extensions = done.stdout.splitlines()
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in said
    assert extensions == "extensions: []"


@pytest.mark.parametrize(
    "code, reason", [(SHOW, "no C++ compiler"), (BLOCK_TORCH + SHOW, "torch cannot be imported")]
)
def test_require_fails_with_one_line(code, reason):
    compiler = "no-such-compiler" if "compiler" in reason else sys.executable
    done = python(code, LSMHA_BUILD="require", CXX=compiler)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"lsmha_fast: LSMHA_BUILD=require, but {reason}")
    assert len(done.stderr.splitlines()) == 1


def test_unknown_mode_names_the_allowed_ones():
    done = python(SHOW, LSMHA_BUILD="yes")
    assert done.returncode == 1
    assert done.stderr == "lsmha_fast: LSMHA_BUILD='yes' is not one of auto, require, skip\n"


def test_with_torch_and_a_compiler_there_is_an_extension():
    # an existing program is all that is looked for; nothing is compiled here
    done = python(SHOW, LSMHA_BUILD="require", CXX=sys.executable)
    assert done.stdout == "extensions: ['lsmha_fast._C']\n", done.stderr


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_failing_compiler(mode, tmp_path):
    """auto leaves a package without extensions and says why in one line; require fails."""
    build = f"sys.argv = ['setup.py', '-q', 'build_ext', '-b', {str(tmp_path)!r}, '-t', 'tmp']"
    build = build.replace("'tmp'", repr(str(tmp_path / "temp")))
    code = f"import runpy, sys; {build}; runpy.run_path('setup.py', run_name='__main__')"
    done = python(code, LSMHA_BUILD=mode, CXX="false")
    assert not list(tmp_path.rglob("*.so"))
    if mode == "require":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    lines = [s for s in done.stdout.splitlines() if s.startswith("lsmha_fast: ")]
    assert len(lines) == 1
    assert lines[0].startswith("lsmha_fast: no native kernels: the build failed (")
