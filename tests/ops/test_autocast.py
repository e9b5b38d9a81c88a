"""Ops compute in the precision of their inputs, whatever autocast the caller is in."""

import pytest
import torch

from lsmha_fast import ops


def qkv():
    return torch.randn(2, 9, 3, 4, 8, requires_grad=True)


CALLS = {
    "attention": lambda x: ops.attention(*x.permute(2, 0, 3, 1, 4), backend="reference"),
    "attention_packed": lambda x: ops.attention_packed(x, backend="reference"),
    "attention_weights": lambda x: ops.attention_weights(*x.permute(2, 0, 3, 1, 4)[:2]),
    "conv_stem": lambda x: ops.conv_stem(
        x.flatten()[: 2 * 3 * 12 * 12].view(2, 3, 12, 12),
        x.flatten()[: 5 * 3 * 9].view(5, 3, 3, 3),
        stride=1,
        padding=1,
    ),
    "seq_pool": lambda x: ops.seq_pool(x[:, :, 0], x[0, 0, 0], backend="reference"),
    "head_class_sums": lambda x: (
        ops.head_class_sums(
            x.detach()[:, :, 0], x.detach()[0, 0, 0], torch.tensor([0, 1]), 3, backend="reference"
        ).sums
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_outside_changes_nothing_inside(name):
    x = qkv()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = CALLS[name](x)
            grad = None
            if out.requires_grad:
                (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    (out, grad), (cast_out, cast_grad) = results
    assert cast_out.dtype == out.dtype
    assert torch.equal(cast_out, out)
    assert grad is None or torch.equal(cast_grad, grad)
