"""EncoderBlock computes what its layers say one after another, from equal random numbers."""

import pytest
import torch

from lsmha_fast.nn import DropPath, EncoderBlock
from lsmha_fast.ops.residual_norm import op
from lsmha_fast.testing import assert_no_worse


def one_after_another(block, x):
    """The block in plain layers."""
    x = x + block.drop_path(
        block.dropout(block.self_attn.project(block.self_attn.heads(block.pre_norm(x))))
    )
    if block.standard_pre_norm:
        return x + block.drop_path(block.mlp(block.norm1(x)))
    x = block.norm1(x)
    return x + block.drop_path(block.mlp(x))


def run(call, block, x):
    """Output and gradients of input and parameters, and the next random number."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = call(block, x)
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    return [out.detach(), *grads], torch.rand(1)


def make(pre_norm, dropout=0.0):
    torch.manual_seed(1)
    block = EncoderBlock(24, 6, drop_path=0.5, pre_norm=pre_norm, dropout=dropout)
    for norm in (block.pre_norm, block.norm1):
        torch.nn.init.normal_(norm.weight, 1.0)
        torch.nn.init.normal_(norm.bias)
    return block


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_forward_and_gradients(pre_norm, dropout, kernels, monkeypatch):
    monkeypatch.setattr(op, "_suits_torch", lambda *_: not kernels)
    block, x = make(pre_norm, dropout), torch.randn(6, 5, 24)
    for training in (True, False):
        block.train(training)
        low, after = run(one_after_another, block.float(), x)
        actual, same = run(lambda block, x: block(x), block, x)
        high, _ = run(one_after_another, block.double(), x.double())
        assert torch.equal(after, same)
        for i, tensors in enumerate(zip(actual, low, high, strict=True)):
            assert_no_worse(*tensors, factor=2 if i == 0 else 3)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_autocast(pre_norm, kernels, monkeypatch):
    """The stream stays fp32, products take bf16."""
    monkeypatch.setattr(op, "_suits_torch", lambda *_: not kernels)
    block, x = make(pre_norm), torch.randn(6, 5, 24)

    def cast(call):
        def inside(block, x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(block, x)

        return inside

    low, _ = run(cast(one_after_another), block, x)
    actual, _ = run(cast(lambda block, x: block(x)), block, x)
    high, _ = run(one_after_another, block.double(), x.double())
    for i, tensors in enumerate(zip(actual, low, high, strict=True)):
        assert_no_worse(*tensors, factor=2 if i == 0 else 3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_compiles_as_one_graph(pre_norm, autocast):
    block, x = make(pre_norm).eval(), torch.randn(6, 5, 24)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drop_path_is_a_product_with_what_was_drawn(dtype):
    x, drop_path = torch.randn(8, 3, 4).to(dtype), DropPath(0.25).train()
    torch.manual_seed(2)
    keep = torch.rand(8, 1, 1) >= 0.25
    torch.manual_seed(2)
    assert torch.equal(drop_path(x), x * (keep.to(dtype) / 0.75))
    torch.manual_seed(2)
    factors = drop_path.draw(x)
    assert torch.equal(factors > 0, keep.flatten())
    assert DropPath(0.25).eval().draw(x) is None
