"""Build Triton kernels for sm_90 where there is no GPU, and read what the compiler made of them.

The tests run Triton in its interpreter, which is chosen once per process; the builds therefore
happen in a subprocess that runs this file.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def compile_configs(module_name: str, opcodes: bool = False) -> list[dict]:
    """Compile every configuration that a kernel module lists, for sm_90.

    The module offers `aot_configs()`, an iterable of
    `(kernel, signature, constexprs, num_warps, num_stages)`:

    * signature: for each run-time parameter its Triton type, with the hints of Triton's own
      ahead-of-time tool: `{"x_ptr": "*fp16:16", "N": "i32", "x_stride": ("i32:16", "i32:1")}`.
      `:16` promises divisibility by 16, `:1` the value 1, as a launch finds out by itself.
    * constexprs: value of each `tl.constexpr` parameter, and None for pointers that are absent.

    Args:
        module_name: such as "lsmha_fast.ops.attention._triton".
        opcodes: also count the SASS instructions (about half a second more per kernel).

    Returns:
        One dict per configuration: `name`, `n_regs` per thread, `n_spills` (bytes of local memory
        per thread), `shared` (bytes per program), `min_dot_k` (the smallest inner dimension of a
        dot, None without dots), `opcodes` (opcode -> count in the kernel; empty unless asked),
        `loops` (the same for every innermost loop).

    Raises:
        RuntimeError: a kernel does not compile; the message holds the compiler's.
    """
    command = [sys.executable, __file__, module_name] + ["opcodes"] * opcodes
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module_name} does not compile for sm_90:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_budgeted(module_name: str) -> list[dict]:
    """`compile_configs` for tests of registers and spills, which hold from one Triton version on.

    An older one has to compile the kernels; then the test is skipped.
    """
    import triton
    from torch.torch_version import TorchVersion

    from benchmarks import static

    configs = compile_configs(module_name)
    wanted = static.kept()["versions"]["triton"]
    if TorchVersion(triton.__version__) < wanted:
        pytest.skip(f"built; budgets are for Triton >= {wanted}, this is {triton.__version__}")
    return configs


def assert_clean(config: dict) -> None:
    """No spills, and every dot deep enough for tensor cores (the interpreter notices neither)."""
    assert config["n_spills"] == 0, f"{config['name']} spills {config['n_spills']} bytes"
    depth = config["min_dot_k"]
    assert depth is None or depth >= 16, f"{config['name']} has a dot with K = {depth}"


def assert_no_worse_than_kept(configs: list[dict]) -> None:
    """Registers and spills are those of benchmarks/static.json, or better."""
    import triton

    from benchmarks import static

    kept = static.kept()
    if kept["versions"]["triton"] == triton.__version__:
        remedy = "if that is meant: python -m benchmarks.static --write"
        worse = static.worse(static.merged(configs), kept["triton"])
        assert not worse, "\n".join([*worse, remedy])


def record_launches(call) -> list[tuple]:
    """Configurations, as `aot_configs()` gives them, of the kernels that `call()` would launch.

    Works on tensors of the meta device, so that the real launcher chooses blocks, strides and
    hints and nothing is computed. For use inside the subprocess (Triton not in its interpreter).
    """
    from unittest import mock

    from triton.runtime.jit import JITFunction

    configs = []

    def run(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **constexprs):
        signature = {}
        names = [name for name in kernel.arg_names if name not in constexprs]
        constants = {p.name for p in kernel.params if p.is_constexpr}
        for name, value in zip(names, args, strict=True):
            if value is None or name in constants:
                constexprs[name] = value
            else:
                signature[name] = _specialize(value)
        configs.append((kernel, signature, constexprs, num_warps, num_stages))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return configs


def _specialize(value) -> str | tuple:
    """Type and hint that a launch gives to one argument."""
    if isinstance(value, tuple):
        return tuple(_specialize(v) for v in value)
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        hint = ":1" if value == 1 else ":16" if value % 16 == 0 else ""
        return ("i32" if value < 2**31 else "i64") + hint
    kind = str(value.dtype).removeprefix("torch.")
    names = {"bfloat": "bf", "float": "fp", "uint": "u", "int": "i", "bool": "i1"}
    for long, short in names.items():
        kind = kind.replace(long, short)
    aligned = value.storage_offset() * value.element_size() % 16 == 0
    return f"*{kind}" + ":16" * aligned


def _split_hints(kernel, signature, constexprs):
    """Triton's compiler wants types, constants and divisibility apart, keyed by position."""
    types, constants, attrs = {}, dict(constexprs), {}

    def leaf(text, position):
        kind, _, hint = text.partition(":")
        if hint == "1":
            constants[position] = 1
            return "constexpr"
        if hint == "16":
            attrs[position] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
        elif isinstance(signature[name], tuple):
            types[name] = tuple(leaf(t, (i, j)) for j, t in enumerate(signature[name]))
        else:
            types[name] = leaf(signature[name], (i,))
    return types, constants, attrs


def _compile(kernel, signature, constexprs, num_warps, num_stages, opcodes):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attrs = _split_hints(kernel, signature, constexprs)
    compiled = triton.compile(
        ASTSource(kernel, types, constants, attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    shown = [f"{k}={v}" for k, v in constexprs.items()]
    pointers = [t for t in signature.values() if isinstance(t, str) and t.startswith("*")]
    dtype = pointers[0][1:].partition(":")[0]
    # `tt.dot a, b, c : tensor<MxKxtype> * ...`
    depths = [int(k) for k in re.findall(r"tt\.dot .*: tensor<\d+x(\d+)x", compiled.asm["ttir"])]
    return {
        "name": f"{kernel.__name__}[{dtype}, {', '.join(shown)}]",
        "shared": compiled.metadata.shared,
        "min_dot_k": min(depths, default=None),
        **_inspect(compiled.asm["cubin"], opcodes),
    }


def _inspect(cubin, opcodes):
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def run(*arguments):
            command = [*arguments, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        sass = run(knobs.nvidia.nvdisasm.path, "-c") if opcodes else ""
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([\w.]+)", sass, re.MULTILINE)
    sys.path[:0] = [str(ROOT / part) for part in ("tests/cuda", "csrc/cuda")]
    from sass import loops_of

    return {
        "n_regs": registers,
        "n_spills": stack + local,
        "opcodes": dict(collections.Counter(found)),
        "loops": [dict(loop.opcodes) for loop in loops_of(sass)],
    }


def _main(module_name, *flags):
    configs = importlib.import_module(module_name).aot_configs()
    print(json.dumps([_compile(*config, "opcodes" in flags) for config in configs]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
