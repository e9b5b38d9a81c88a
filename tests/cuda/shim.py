"""Build and run kernels without a GPU: the C++ compiler, over the headers of tests/cuda/shim.

A harness is a C++ file with a `main` that takes its arguments from `harness::Arguments` and calls
`dev::launch`. See `example_harness.cpp` and `test_example.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "shim"
KERNELS = ROOT / "csrc/cuda"
BUILD = ROOT / "build/shim"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = [
    *("-std=c++20", "-Og", "-g1", "-fno-omit-frame-pointer", "-fno-strict-aliasing"),
    # a product and a sum are rounded apart, as written: dev::fma is the fused one
    "-ffp-contract=off",
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    # local variables without a value hold 0xfe in every byte
    "-ftrivial-auto-var-init=pattern",
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable"),
    *("-Wno-attributes", "-Werror=return-type", "-Werror=uninitialized"),
]
# reports in few lines; leaks are the harness's and of no interest
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class KernelError(AssertionError):
    """A kernel did what it must not do; the text is the shim's or the sanitizer's."""


def unusable() -> str | None:
    """Why harnesses cannot be built here, or None."""
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler: {COMPILER[0]!r} is not on PATH"
    return None


def build(source: str | Path, *flags: str) -> Path:
    """Compile a harness, or find the one compiled from the same text by the same command.

    Args:
        source: a C++ file, such as `Path(__file__).with_name("attention_harness.cpp")`.
        flags: further flags, such as `-DDIM=2`, to build parts of a harness apart.
    """
    source = Path(source)
    command = [*COMPILER, *FLAGS, *flags, "-I", str(KERNELS), "-I", str(SHIM)]
    binary = BUILD / f"{source.stem}-{digest(source, command)}"
    if not binary.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        _forget_old(BUILD)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            out = Path(folder, "harness")
            done = subprocess.run(
                [*command, "-o", str(out), str(source)], capture_output=True, text=True
            )
            if done.returncode:
                raise KernelError(f"{source.name} does not compile:\n{done.stderr[:8000]}")
            out.rename(binary)
    return binary


def _forget_old(folder: Path, days: float = 3) -> None:
    """Remove what was built from texts that have changed since."""
    for path in folder.iterdir():
        if path.is_file() and time.time() - path.stat().st_mtime > days * 86400:
            path.unlink(missing_ok=True)


def digest(source: Path, command: list[str]) -> str:
    """Names what `command` makes of a source file and what it includes of this repository."""
    found = hashlib.sha256(repr(command).encode())
    for path in sorted(_included(source)):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _included(source: Path):
    """The file and what it includes with quotes, of this repository."""
    seen, left = set(), [source]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include\s+"(.+)"', path.read_text(), re.MULTILINE):
            found = [p / name for p in (path.parent, KERNELS, SHIM) if (p / name).is_file()]
            left += [p.resolve() for p in found[:1]]
    return seen


def run(binary: Path, **arguments: Tensor | float | str) -> None:
    """Run a harness; tensors (any strides, CPU) are changed in place where the kernel wrote.

    Views share their storage with nothing here: each tensor's whole storage is copied, so two views
    of one tensor are two tensors to the kernel.

    Raises:
        KernelError: the shim or a sanitizer ended it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "arguments")
        places = _write(path, arguments)
        with _fixed_addresses():
            done = subprocess.run(
                [str(binary), str(path)],
                env={**os.environ, **SANITIZERS},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise KernelError(f"{binary.name} ended with {done.returncode}:\n{done.stderr[:6000]}")
        with path.open("rb") as file:
            for tensor, place in places:
                storage = _storage(tensor)
                file.seek(place)
                data = bytearray(file.read(storage.numel()))
                if data:
                    storage.copy_(torch.frombuffer(data, dtype=torch.uint8))


@contextlib.contextmanager
def _fixed_addresses():
    """Programs started inside get no random addresses, where the system allows that: older
    AddressSanitizers fail by chance where a kernel randomises many bits."""
    libc, no_random = ctypes.CDLL(None), 0x0040000
    before = libc.personality(0xFFFFFFFF)
    libc.personality(before | no_random)
    try:
        yield
    finally:
        libc.personality(before)


def _storage(tensor: Tensor) -> Tensor:
    """Bytes of the whole storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _write(path: Path, arguments: dict) -> list[tuple[Tensor, int]]:
    places = []
    with path.open("wb") as file:
        for name, value in arguments.items():
            if isinstance(value, str):
                file.write(f"text {name} {value}\n".encode())
                continue
            if not isinstance(value, Tensor):
                file.write(f"number {name} {float(value)!r}\n".encode())
                continue
            value = value.detach()
            data = _storage(value).numpy().tobytes()
            dtype = str(value.dtype).removeprefix("torch.")
            shape = " ".join(map(str, (*value.shape, *value.stride())))
            offset = value.storage_offset() * value.element_size()
            line = f"tensor {name} {dtype} {len(data)} {offset} {value.dim()} {shape}".rstrip()
            file.write(line.encode() + b"\n")
            places.append((value, file.tell()))
            file.write(data + b"\n")
        file.write(b"end\n")
    return places
