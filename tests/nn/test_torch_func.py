"""torch.func over the attention ops and LSMultiHeadAttention: exact, or a clear error."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, vmap

from lsmha_fast import LSMultiHeadAttention
from lsmha_fast.ops import attention, attention_packed, attention_weights

B, H, N, D = 2, 3, 5, 4


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.double) for shape in shapes]


OPTIONS = {
    "plain": {},
    "key_mask": {"key_mask": (B, N)},
    "head_scale": {"head_scale": (H,)},
    "bias": {"bias": (H, N, N)},
    "bias of a sample": {"bias": (B, 1, N, N)},
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_equals_a_loop(name, mapped):
    """Values and gradients of q, k, v and of the option, mapped or shared by the samples."""
    q, k, v = tensors(*[(3, B, H, N, D)] * 3)
    options = {}
    for key, shape in OPTIONS[name].items():
        (options[key],) = tensors((3, *shape) if mapped else shape)
        if key == "key_mask":
            options[key] = options[key] > -1
    dims = dict.fromkeys(options, 0 if mapped else None)

    def loss(q, k, v, options):
        return attention(q, k, v, **options).square().sum()

    floats = {key: t for key, t in options.items() if t.is_floating_point()}
    masks = {key: t for key, t in options.items() if key not in floats}

    def grads(q, k, v, floats, masks):
        return grad(lambda *args: loss(*args[:3], args[3] | masks), argnums=(0, 1, 2, 3))(
            q, k, v, floats
        )

    in_dims = (0, 0, 0, {k: dims[k] for k in floats}, {k: dims[k] for k in masks})
    actual = vmap(grads, in_dims=in_dims)(q, k, v, floats, masks)
    out = vmap(lambda q, k, v, o: attention(q, k, v, **o), in_dims=(0, 0, 0, dims))(
        q, k, v, options
    )
    for i in range(3):
        mine = {key: t[i] if mapped else t for key, t in options.items()}
        inputs = [t[i].clone().requires_grad_() for t in (q, k, v)]
        mine = {k: t.requires_grad_() if k in floats else t for k, t in mine.items()}
        expected = attention(*inputs, **mine)
        torch.testing.assert_close(out[i], expected)
        wanted = torch.autograd.grad(expected.square().sum(), [*inputs, *(mine[k] for k in floats)])
        got = [*(t[i] for t in actual[:3]), *(actual[3][k][i] for k in floats)]
        torch.testing.assert_close(got, list(wanted))


@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap_of_packed_and_weights(in_dim):
    (qkv,) = tensors((3, B, N, 3, H, D))
    moved = qkv.movedim(0, in_dim)
    actual = vmap(attention_packed, in_dims=in_dim)(moved)
    torch.testing.assert_close(actual, torch.stack([attention_packed(t) for t in qkv]))
    q, k = tensors((3, B, H, N, D), (B, H, N, D))
    expected = torch.stack([attention_weights(t, k) for t in q])
    torch.testing.assert_close(vmap(attention_weights, in_dims=(0, None))(q, k), expected)
    nested = vmap(vmap(attention_packed))(qkv[:, None])
    torch.testing.assert_close(nested[:, 0], actual)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_per_sample(need_weights):
    module = LSMultiHeadAttention(12, 3, batch_first=True).double()
    parameters = dict(module.named_parameters())
    (x,) = tensors((4, N, 12))

    def loss(parameters, sample):
        out, _ = functional_call(
            module, parameters, (sample[None],) * 3, {"need_weights": need_weights}
        )
        return out.square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        torch.testing.assert_close([actual[name][i] for name in parameters], list(expected))


def test_dropout_under_vmap_follows_its_randomness_argument():
    (qkv,) = tensors((B, N, 3, H, D))
    stack = qkv.expand(3, *qkv.shape)

    def call(x):
        return attention_packed(x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="random"):
        vmap(call)(stack)
    same = vmap(call, randomness="same")(stack)
    assert torch.equal(same[0], same[1])
    different = vmap(call, randomness="different")(stack)
    assert not torch.equal(different[0], different[1])


def test_what_has_no_rule_says_so():
    (qkv,) = tensors((B, N, 3, H, D))

    def loss(x):
        return attention_packed(x).square().sum()

    with pytest.raises(RuntimeError, match="jvp"):
        jvp(loss, (qkv,), (qkv,))
    with pytest.raises((RuntimeError, NotImplementedError)):
        hessian(loss)(qkv)
    qkv.requires_grad_()
    (first,) = torch.autograd.grad(loss(qkv), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
