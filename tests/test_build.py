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
    done = python(built_with(None) + SHOW, LSMHA_BUILD="require", CXX=sys.executable)
    assert done.stdout == "extensions: ['lsmha_fast._C']\n", done.stderr


def built_with(cuda):
    """Code after which torch is a build for that CUDA, or a CPU build."""
    compiled = f"torch.cuda._is_compiled = lambda: {cuda is not None}"
    return f"import torch; torch.version.cuda = {cuda!r}; {compiled}\n"


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like CUDA 13.0, whose nvcc compiles nothing."""
    root = tmp_path / "cuda"
    script = f"""
        case "$*" in
        *--version*) echo "Cuda compilation tools, release 13.0, V13.0.1" ;;
        *--dryrun*) echo "#$ TOP={root}/bin/.." >&2 ;;
        *) exit 1 ;;
        esac"""
    program(root / "bin/nvcc", script)
    (root / "lib64").mkdir()
    (root / "lib64/libcudart_static.a").touch()
    return root


def program(path, script):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_with_a_toolkit_there_are_cuda_kernels(toolkit):
    done = python(built_with("13.2") + SHOW, LSMHA_BUILD="require", CUDA_HOME=str(toolkit))
    assert done.stdout == "extensions: ['lsmha_fast._C', 'lsmha_fast._C_cuda']\n", done.stderr


# prints what the CUDA extension would be compiled with
SHOW_FLAGS = (
    SHOW.replace("lambda **k:", "lambda **k: globals().update(found=k['ext_modules']) or")
    + """
[cuda] = [e for e in found if e.name.endswith("_C_cuda")]
import os
print(os.environ["TORCH_CUDA_ARCH_LIST"])
print([f for f in cuda.extra_compile_args["cxx"] if "ARCH" in f])
print("--threads=2" in cuda.extra_compile_args["nvcc"])
"""
)


@pytest.mark.parametrize("given", [None, "9.0a", "8.6 9.0+PTX"])
def test_architectures_default_and_are_obeyed(toolkit, given):
    env = dict(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=given)
    done = python(built_with("13.0") + SHOW_FLAGS, **env)
    expected = given or "8.0;9.0a"
    assert done.stdout.splitlines()[1:3] == [
        expected,
        repr([f'-DLSMHA_CUDA_ARCHITECTURES="{expected}"']),
    ]


@pytest.mark.parametrize("jobs", [1, 1000])
def test_max_jobs_is_obeyed_by_nvcc_too(toolkit, jobs):
    env = dict(CUDA_HOME=str(toolkit), MAX_JOBS=str(jobs))
    done = python(built_with("13.0") + SHOW_FLAGS, **env)
    assert done.stdout.splitlines()[-1] == str(jobs > 1)


def test_without_a_toolkit_auto_says_so_and_require_fails(tmp_path):
    env = dict(CUDA_HOME=str(tmp_path))
    reason = f"CUDA_HOME={tmp_path} has no bin/nvcc and libcudart_static.a"
    done = python(built_with("13.0") + SHOW, **env)
    assert done.stdout.splitlines() == [
        f"lsmha_fast: no CUDA kernels: {reason}",
        "extensions: ['lsmha_fast._C']",
    ]
    done = python(built_with("13.0") + SHOW, LSMHA_BUILD="require", **env)
    assert done.returncode == 1
    assert done.stderr == f"lsmha_fast: LSMHA_BUILD=require, but {reason}\n"


def test_a_toolkit_of_another_major_version_is_refused(toolkit):
    done = python(built_with("12.8") + SHOW, CUDA_HOME=str(toolkit))
    assert done.stdout.splitlines() == [
        "lsmha_fast: no CUDA kernels: the CUDA toolkit is 13.0, but torch was built with CUDA 12.8",
        "extensions: ['lsmha_fast._C']",
    ]


FIND = "import sys; sys.path.insert(0, 'csrc/cuda'); import cuda_toolkit as c; print(c.find())"


def test_the_toolkit_is_found_behind_a_script(toolkit, tmp_path):
    program(tmp_path / "bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    done = python(FIND, CUDA_HOME=None, PATH=path)
    assert done.stdout == f"{toolkit}\n", done.stderr
    other = python(FIND, CUDA_HOME=str(tmp_path), PATH=path)
    assert other.stdout == f"CUDA_HOME={tmp_path} has no bin/nvcc and libcudart_static.a\n"


def test_the_toolkit_is_found_in_a_package(toolkit, tmp_path):
    packages = tmp_path / "packages"
    (packages / "nvidia").mkdir(parents=True)
    (packages / "nvidia/cu13").symlink_to(toolkit)
    block = f"import sysconfig; sysconfig.get_path = lambda name: {str(packages)!r}\n"
    done = python(block + FIND, CUDA_HOME=None, PATH="/nowhere")
    assert done.stdout == f"{packages}/nvidia/cu13\n", done.stderr
    (toolkit / "lib64/libcudart_static.a").unlink()
    done = python(block + FIND, CUDA_HOME=None, PATH="/nowhere")
    assert done.stdout.startswith("no CUDA toolkit with bin/nvcc and libcudart_static.a")


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_failing_cuda_kernels_leave_the_cpu_ones(mode, toolkit, tmp_path):
    # a compiler and linker that write what they are asked for, empty
    touch = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done'
    compiler = str(program(tmp_path / "touch", touch))
    out = tmp_path / "out"
    env = dict(CXX=compiler, CC=compiler, LDSHARED=compiler, LDCXXSHARED=compiler)
    done = build(out, built_with("13.0"), LSMHA_BUILD=mode, CUDA_HOME=str(toolkit), **env)
    assert [p.name for p in out.rglob("*.so")] == ["_C.abi3.so"]
    if mode == "require":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    [line] = [s for s in done.stdout.splitlines() if s.startswith("lsmha_fast: ")]
    assert line.startswith("lsmha_fast: no lsmha_fast._C_cuda: the build failed (")


def build(out, prelude="", **env):
    """Run build_ext into a folder."""
    argv = ["setup.py", "-q", "build_ext", "-b", str(out), "-t", f"{out}-temp"]
    code = (
        f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path('setup.py', run_name='__main__')"
    )
    return python(prelude + code, **env)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_failing_compiler(mode, tmp_path):
    """auto leaves a package without extensions and says why in a line for each; require fails."""
    done = build(tmp_path / "out", built_with(None), LSMHA_BUILD=mode, CXX="false")
    assert not list(tmp_path.rglob("*.so"))
    if mode == "require":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    lines = [s for s in done.stdout.splitlines() if s.startswith("lsmha_fast: ")]
    assert len(lines) == 1
    assert lines[0].startswith("lsmha_fast: no lsmha_fast._C: the build failed (")
