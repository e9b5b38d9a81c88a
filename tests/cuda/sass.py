"""What nvcc makes of CUDA kernels: registers, spills, instructions of loops. Needs no GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import cuda_toolkit
import shim

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/sass"
ARCHITECTURES = ("sm_80", "sm_90a")


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, as one warp issues them in one iteration."""

    address: int
    opcodes: Counter

    @property
    def slots(self) -> int:
        """Issue slots; a branch around a part of the loop counts with the part."""
        return self.opcodes.total()

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts so, such as "HMMA" or "MUFU.EX2"."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))

    def per_score(self, scores: int) -> dict[str, float]:
        """Per score, counted as instructions of one lane: a warp's times 32.

        Args:
            scores: how many scores a warp computes in one iteration.
        """
        counts = {"slots": self.slots, "mufu": self.count("MUFU"), "hmma": self.count("HMMA")}
        return {name: n * 32 / scores for name, n in counts.items()}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `__global__` function as ptxas left it; sizes in bytes."""

    name: str
    registers: int
    stack: int
    spills: int
    instructions: Counter
    loops: tuple[Loop, ...]

    @property
    def loop(self) -> Loop:
        """The longest innermost loop."""
        return max(self.loops, key=lambda loop: loop.slots)

    @property
    def local_accesses(self) -> int:
        return sum(n for op, n in self.instructions.items() if op.startswith(("LDL", "STL")))

    def assert_clean(self, registers: int = 255) -> None:
        """No spills, no local memory, at most so many registers per thread."""
        assert self.spills == 0, f"{self.name} spills {self.spills} bytes"
        assert self.stack == 0, f"{self.name} has {self.stack} bytes of local memory"
        assert self.local_accesses == 0, f"{self.name} reads or writes local memory"
        assert self.registers <= registers, f"{self.name}: {self.registers} registers"


def unusable() -> str | None:
    """Why kernels cannot be compiled and read here, or None."""
    return cuda_toolkit.missing() or (_disassembler() is None and "no nvdisasm") or None


def compile_kernels(source: str | Path, arch: str, *flags: str) -> dict[str, Kernel]:
    """Compile a .cu file and read every kernel in it; the result is kept for the same text.

    Args:
        source: a file that needs no torch, such as one that instantiates kernel templates.
        arch: one of `ARCHITECTURES`.
        flags: more flags for nvcc, such as `-DDIM=2`.

    Returns:
        Kernels by their demangled name, such as `void row_sums<dev::Bf16>(dev::Bf16 const*, int)`.
    """
    source = Path(source)
    command = [str(cuda_toolkit.nvcc(cuda_toolkit.find())), "-std=c++17", "-O3", "-cubin"]
    command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}", "-Xptxas", "-v"]
    command += ["-I", str(shim.KERNELS), *flags]
    folder = BUILD / f"{source.stem}-{arch}-{shim.digest(source, command)}"
    if not folder.exists():
        _compile(source, command, folder)
    usage = _read_usage((folder / "log").read_text())
    instructions = _read_instructions((folder / "sass").read_text())
    names = _demangle(list(usage))
    return {
        name: _kernel(name, *usage[mangled], instructions[mangled])
        for mangled, name in zip(usage, names, strict=True)
    }


def _compile(source, command, folder):
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        cubin = made / "cubin"
        done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[:8000]}")
        sass = [_disassembler(), "-c", cubin]
        (made / "sass").write_text(
            subprocess.run(sass, capture_output=True, text=True, check=True).stdout
        )
        (made / "log").write_text(done.stderr)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)


def library_usage(library: str | Path) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel, registers, bytes of local memory) of all machine code in a library."""
    command = [tool("cuobjdump"), "--dump-resource-usage", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for part in text.split("\narch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for name, numbers in re.findall(r"Function (\w+):\s+(REG:.*)", part):
            usage = {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", numbers)}
            found.append((arch, name, usage["REG"], usage["STACK"] + usage["LOCAL"]))
    names = _demangle([name for _, name, _, _ in found])
    return [(u[0], name, *u[2:]) for u, name in zip(found, names, strict=True)]


def _disassembler() -> str | None:
    return tool("nvdisasm")


def tool(name: str) -> str | None:
    """A program of the toolkit, else the one that Triton brings, else None."""
    root = cuda_toolkit.find()
    if isinstance(root, Path) and (root / "bin" / name).is_file():
        return str(root / "bin" / name)
    try:
        from triton import knobs

        return getattr(knobs.nvidia, name).path
    except (ImportError, RuntimeError):
        return None


def _demangle(names):
    try:
        done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    except OSError:
        return names
    return done.stdout.splitlines()


def _read_usage(log):
    """Mangled name -> (registers, stack, spills) from what `-Xptxas -v` prints."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        usage[part.partition("'")[0]] = registers, stack, stores + loads
    return usage


def _read_instructions(sass):
    """Mangled name -> [(address, opcode, predicated, target address or None)]."""
    kernels = {}
    for part in re.split(r"^//-+ \.text\.", sass, flags=re.MULTILINE)[1:]:
        name = part.split(maxsplit=1)[0]
        labels, found, waiting = {}, [], []
        for line in part.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                waiting.append(label.group(1))
            elif match := _INSTRUCTION.match(line):
                address = int(match["address"], 16)
                labels.update(dict.fromkeys(waiting, address))
                waiting = []
                found.append((address, match["opcode"], match["predicate"], match["target"]))
        kernels[name] = [
            (address, opcode, predicate is not None, labels.get(target))
            for address, opcode, predicate, target in found
        ]
    return kernels


_INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?:.*`\((?P<target>\.L_\w+)\))?"
)


def _kernel(name, registers, stack, spills, instructions):
    opcodes = Counter(op for _, op, _, _ in instructions if op != "NOP")
    return Kernel(name, registers, stack, spills, opcodes, tuple(_innermost(instructions)))


def loops_of(sass: str) -> list[Loop]:
    """Innermost loops of all kernels in what nvdisasm prints."""
    return [loop for found in _read_instructions(sass).values() for loop in _innermost(found)]


def _innermost(instructions):
    """Loops without a loop inside: from the target of a branch backwards to the branch."""
    ranges = []
    for address, opcode, _, target in instructions:
        if not opcode.startswith("BRA") or target is None or target >= address:
            continue
        body = [i for i in instructions if target <= i[0] <= address]
        # a part that stands behind the end and jumps back to where it belongs is not a loop
        if not any(op == "EXIT" and not predicated for _, op, predicated, _ in body):
            ranges.append((target, address, body))
    for first, last, body in ranges:
        inside = [r for r in ranges if r[:2] != (first, last) and first <= r[0] and r[1] <= last]
        if not inside:
            yield Loop(first, Counter(op for _, op, _, _ in body if op != "NOP"))
