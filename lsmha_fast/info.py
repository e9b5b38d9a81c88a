"""Versions and backends, and why one is missing: `lsmha info`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from ._version import __version__

# what the commands use beyond the runtime dependencies, by the extra of pyproject.toml
EXTRAS = {
    "train": ("tqdm", "safetensors", "timm", "torchvision", "pillow"),
    "report": ("matplotlib", "safetensors", "jinja2"),
    "log": ("tensorboard",),
    "data": ("scikit-learn", "matplotlib", "fonttools", "pillow", "pyarrow"),
    "zoo": ("timm", "torchvision", "vit-pytorch", "onnxruntime", "onnxscript"),
}


def info_lines() -> list[str]:
    """What `lsmha info` prints."""
    lines = [
        f"lsmha_fast {__version__}, Python {platform.python_version()}, {platform.machine()}",
        *_torch_lines(),
        *(_extra_line(extra, names) for extra, names in EXTRAS.items()),
    ]
    return lines


def versions() -> dict[str, str]:
    """What a result depends on, name -> version."""
    python = {"lsmha_fast": __version__, "Python": platform.python_version()}
    return {**python, **{name: _version(name) for name in ("torch", "numpy", "triton")}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _extra_line(extra: str, names: tuple[str, ...]) -> str:
    found = {name: _version(name) for name in names}
    line = f"extra {extra}: " + ", ".join(f"{name} {version}" for name, version in found.items())
    return line + f"; pip install 'lsmha_fast[{extra}]'" * ("missing" in found.values())


def _torch_lines() -> list[str]:
    try:
        import torch
    except ModuleNotFoundError:
        return ["torch: missing (pip install torch); only `lsmha info` and `lsmha --help` work"]
    from ._ext import cuda_ext_missing, ext_missing
    from .ops._triton_utils import triton_missing

    cuda = "no CUDA device"
    if torch.cuda.is_available():
        cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    no_device = None
    if not torch.cuda.is_available():
        no_device = "installed, but there is no CUDA device to run on"
    triton = triton_missing() or f"{_version('triton')} {no_device or 'ready'}"
    cpp, native = ext_missing(), cuda_ext_missing() or no_device
    return [
        f"torch {torch.__version__} (CUDA build {torch.version.cuda or 'none'}): {cuda}, "
        f"{torch.get_num_threads()} CPU threads",
        "backend reference: ready",
        f"backend triton: {triton}",
        f"backend cpp: {cpp or 'ready'}",
        f"backend cuda: {native or 'ready'}",
    ]


if __name__ == "__main__":
    print("\n".join(info_lines()))
    sys.exit(0)
