"""Build the optional native kernels. All metadata is in pyproject.toml.

LSMHA_BUILD=auto (default) builds what this machine can build and says in one line what it lacks,
require fails instead, skip builds nothing. CUDA kernels are asked for where torch is a CUDA build;
no GPU is needed. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST (default 8.0;9.0a) and MAX_JOBS keep their
usual meaning.
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
sys.path.insert(0, str(ROOT / "csrc/cuda"))

import cuda_toolkit  # noqa: E402

# the oldest PyTorch a binary runs under: 2.11
TARGET_VERSION = "0x020b000000000000"
# everything but the module's entry stays inside the library: other libraries of a process may have
# functions of the same names
EXPORTS = ["-Wl,--version-script=csrc/exports.map"]
# Ampere and its successors of one generation, and Hopper with what only it has
ARCHITECTURES = "8.0;9.0a"


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


def cuda_missing():
    """What this machine lacks for the CUDA kernels of a CUDA build of torch, or None."""
    import torch

    lack = cuda_toolkit.missing()
    if lack:
        return lack
    have, want = cuda_toolkit.version(cuda_toolkit.find()), torch.version.cuda
    if have.partition(".")[0] != want.partition(".")[0]:
        return f"the CUDA toolkit is {have}, but torch was built with CUDA {want}"
    return None


def flags():
    """Compiler flags for every extension; no path of this machine may reach a binary."""
    import torch

    # the last prefix that matches wins, so the narrower ones come later
    names = {sys.prefix: "python", ROOT: ".", Path(torch.__file__).parent: "torch"}
    maps = [f"-ffile-prefix-map={path}={name}" for path, name in names.items()]
    return ["-O3", "-g0", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", *maps]


def files(folder):
    """Files of a folder in csrc and those of them that are compiled."""
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).iterdir())
    return paths, [path for path in paths if path.endswith((".cpp", ".cu"))]


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    depends, sources = files("cpu")
    cpu = CppExtension("lsmha_fast._C", sources, depends=depends, py_limited_api=True)
    cpu.extra_compile_args = flags()
    cpu.extra_link_args = EXPORTS
    # torch's default adds libtorch, which drags in the CUDA libraries of a CUDA build
    cpu.libraries = ["torch_cpu"]
    return cpu


def cuda_extension():
    root = cuda_toolkit.find()
    # read when torch's module is imported, which would take the folder of a script for the root
    os.environ["CUDA_HOME"] = str(root)
    listed = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import CUDAExtension

    depends, sources = files("cuda")
    cuda = CUDAExtension("lsmha_fast._C_cuda", sources, depends=depends, py_limited_api=True)
    kernels = sum(name.endswith(".cu") for name in sources)
    # where there are more cores than files, the machine code of two GPUs at once
    given = os.environ.get("MAX_JOBS", "")
    jobs = int(given) if given.isdigit() else os.cpu_count() or 1
    threads = ["--threads=2"] if jobs >= 2 * kernels else []
    defines = ["-DUSE_CUDA", f'-DLSMHA_CUDA_ARCHITECTURES="{listed}"']
    # nvcc passes on what is for the host compiler alone
    device = [f"-Xcompiler={f}" if f.startswith(("-f", "-g", "-W")) else f for f in flags()]
    cuda.extra_compile_args = {"cxx": [*flags(), *defines], "nvcc": [*device, *threads]}
    # the runtime goes in whole, so that the binary does not ask for one release of CUDA
    cuda.libraries = ["torch_cpu", "torch_cuda", "dl", "rt", "pthread"]
    cuda.extra_objects = [str(cuda_toolkit.static_runtime(root))]
    cuda.extra_link_args = EXPORTS
    return cuda


def extensions(mode):
    """One extension per set of libraries, so that each loads wherever those exist."""
    import torch

    if torch.version.cuda is None:
        return [cpu_extension()]
    reason = cuda_missing()
    if reason and mode == "require":
        sys.exit(f"lsmha_fast: LSMHA_BUILD=require, but {reason}")
    if reason:
        print(f"lsmha_fast: no CUDA kernels: {reason}")
        return [cpu_extension()]
    # first the CUDA extension, which sets what torch's module reads when it is imported
    cuda = cuda_extension()
    return [cpu_extension(), cuda]


def build_ext(mode):
    """The build_ext command; in mode auto, one that fails to build is left out."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrFallBack(BuildExtension):
        def run(self):
            wanted, compiler, built = self.extensions, self.compiler, []
            for extension in wanted:
                self.extensions, self.compiler = [extension], compiler
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:
                    if mode == "require":
                        raise
                    reason = str(error).partition("\n")[0]
                    print(f"lsmha_fast: no {extension.name}: the build failed ({reason})")
            self.extensions = self.distribution.ext_modules = built
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None and not built:
                wheel.root_is_pure = True

    return BuildOrFallBack


def arguments():
    """What to pass to setup() under the present LSMHA_BUILD."""
    # an archive does not say who made it
    options = {"sdist": {"owner": "root", "group": "root"}}
    mode = os.environ.get("LSMHA_BUILD", "auto")
    if mode not in ("auto", "require", "skip"):
        sys.exit(f"lsmha_fast: LSMHA_BUILD={mode!r} is not one of auto, require, skip")
    reason = "LSMHA_BUILD=skip" if mode == "skip" else missing()
    if reason and mode == "require":
        sys.exit(f"lsmha_fast: LSMHA_BUILD=require, but {reason}")
    if reason:
        print(f"lsmha_fast: no native kernels: {reason}")
        return {"options": options}
    return {
        "ext_modules": extensions(mode),
        "cmdclass": {"build_ext": build_ext(mode)},
        "options": {**options, "bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**arguments())
