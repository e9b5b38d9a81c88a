"""Find the CUDA compiler: for setup.py and for the tests. Needs neither torch nor a GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path


@functools.cache
def find() -> Path | str:
    """The root of a toolkit with a compiler and the static runtime, or what is missing.

    Looked for in CUDA_HOME, then behind the nvcc on PATH (which may be a script), then in the
    packages that pip installs. A CUDA_HOME that is set is obeyed or reported.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        return _complete(Path(home)) or f"CUDA_HOME={home} has no {_LACKS}"
    on_path = shutil.which("nvcc")
    roots = [_root_behind(on_path)] if on_path else []
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    roots += [*sorted(packages.glob("cu[0-9]*"), reverse=True), packages / "cuda_nvcc"]
    for root in roots:
        if root and _complete(root):
            return root
    return f"no CUDA toolkit with {_LACKS} (set CUDA_HOME)"


_LACKS = "bin/nvcc and libcudart_static.a"


def _root_behind(nvcc: str) -> Path | None:
    """What the compiler itself says; a link or a script on PATH does not show it."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found.group(1).strip()).resolve() if found else None


def _complete(root: Path) -> Path | None:
    return root if nvcc(root).is_file() and static_runtime(root) else None


def nvcc(root: Path) -> Path:
    return root / "bin/nvcc"


def static_runtime(root: Path) -> Path | None:
    """libcudart_static.a."""
    folders = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
    paths = [folder / "libcudart_static.a" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def version(root: Path) -> str:
    """Such as "13.0"."""
    command = [str(nvcc(root)), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def missing() -> str | None:
    """Why there is no CUDA compiler, or None."""
    found = find()
    return found if isinstance(found, str) else None
