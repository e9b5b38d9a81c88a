"""Build the optional native kernels. All metadata is in pyproject.toml.

LSMHA_BUILD=auto (default) builds what this machine can build and says in one line what it lacks,
require fails instead, skip builds nothing. CXX and MAX_JOBS keep their usual meaning.
"""

import importlib
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# the oldest PyTorch a binary runs under: 2.11
TARGET_VERSION = "0x020b000000000000"


def missing():
    """What this machine lacks for native kernels, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (set CXX)"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI"
    try:
        importlib.import_module("torch")
    except ImportError as error:
        return f"torch cannot be imported ({error}); use pip install --no-build-isolation ."
    return None


def flags():
    """Compiler flags for every extension; no path of this machine may reach a binary."""
    import torch

    # the last prefix that matches wins, so the narrower ones come later
    names = {sys.prefix: "python", ROOT: ".", Path(torch.__file__).parent: "torch"}
    maps = [f"-ffile-prefix-map={path}={name}" for path, name in names.items()]
    return ["-O3", "-g0", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", *maps]


def extensions():
    """One extension per set of libraries, so that each loads wherever those exist."""
    from torch.utils.cpp_extension import CppExtension

    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").iterdir())
    sources = [name for name in files if name.endswith(".cpp")]
    cpu = CppExtension("lsmha_fast._C", sources, depends=files, py_limited_api=True)
    cpu.extra_compile_args = flags()
    # torch's default adds libtorch, which drags in the CUDA libraries of a CUDA build
    cpu.libraries = ["torch_cpu"]
    return [cpu]


def build_ext(mode):
    """The build_ext command; in mode auto a failing compiler leaves a pure-Python package."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrFallBack(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if mode == "require":
                    raise
                reason = str(error).partition("\n")[0]
                print(f"lsmha_fast: no native kernels: the build failed ({reason})")
                self.extensions = self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel is not None:
                    wheel.root_is_pure = True

    return BuildOrFallBack


def arguments():
    """What to pass to setup() under the present LSMHA_BUILD."""
    mode = os.environ.get("LSMHA_BUILD", "auto")
    if mode not in ("auto", "require", "skip"):
        sys.exit(f"lsmha_fast: LSMHA_BUILD={mode!r} is not one of auto, require, skip")
    reason = "LSMHA_BUILD=skip" if mode == "skip" else missing()
    if reason and mode == "require":
        sys.exit(f"lsmha_fast: LSMHA_BUILD=require, but {reason}")
    if reason:
        print(f"lsmha_fast: no native kernels: {reason}")
        return {}
    return {
        "ext_modules": extensions(),
        "cmdclass": {"build_ext": build_ext(mode)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**arguments())
