"""The native kernels of residual_norm against PyTorch's, alone and in an encoder block, in turns.

python -m benchmarks.residual_norm_turns [--threads 1]

Tokens (16, 256, 256), in the block 64 heads; medians of a call in ms of processor time, and how
many times as long PyTorch's kernels take. `ops/residual_norm/op.py` chooses by these numbers.
"""

import argparse
import time
from unittest import mock

import torch

from benchmarks import bench_residual_norm as bench
from benchmarks.interleaved import medians
from lsmha_fast.nn import EncoderBlock
from lsmha_fast.ops.residual_norm import op

SHAPE = (16, 256, 256)


def op_calls(types, form, backward):
    """One call of the op: plain, and by the kernels."""
    args, options, grads = bench.inputs(SHAPE, types, form)

    def calls(method):
        if backward:
            return lambda: bench.step(method, args, options, grads)
        return torch.no_grad()(lambda: method(*args, **options))

    return {"torch": calls(bench.eager), "cpp": calls(bench.ours("cpp"))}


def block_calls(types, pre_norm, backward):
    """One block with stochastic depth, whose norms are those of PyTorch or the kernels."""
    block = EncoderBlock(SHAPE[-1], 64, drop_path=0.1, pre_norm=pre_norm).train(backward)
    x, do = torch.randn(2, *SHAPE).unbind()
    leaves = [x.requires_grad_(), *block.parameters()]

    def call(by_torch):
        with (
            mock.patch.object(op, "_suits_torch", return_value=by_torch),
            torch.autocast("cpu", torch.bfloat16, enabled=types == "autocast"),
            torch.set_grad_enabled(backward),
        ):
            out = block(x)
        if backward:
            torch.autograd.grad(out, leaves, do)

    return {"torch": lambda: call(True), "cpp": lambda: call(False)}


def main():
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    cases = {}
    for backward in (False, True):
        name = "both" if backward else "forward"
        for types in bench.TYPES:
            for form in bench.FORMS:
                cases[f"op, {types}, {form}, {name}"] = op_calls(types, form, backward)
        for types in ("float32", "autocast"):
            for pre_norm in (False, True):
                form = "standard" if pre_norm else "published"
                key = f"block, {types}, {form}, {name}"
                cases[key] = block_calls(types, pre_norm, backward)
    for name, calls in cases.items():
        found = medians(calls, rounds=11, timer=time.process_time)
        ratio = found["torch"] / found["cpp"]
        print(
            f"{name}: {1e3 * found['torch']:.2f} {1e3 * found['cpp']:.2f} {ratio:.2f}", flush=True
        )


if __name__ == "__main__":
    main()
