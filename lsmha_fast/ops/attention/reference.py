"""Attention: the definition in plain PyTorch and its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Inputs, dropout_rule

PHILOX_ROUNDS = 7
# of the averaged weights: enough to fill a device, few enough to hold
HEADS_AT_ONCE = 4


def attention(a: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) with the heads last in memory, and log-sum-exp (B, H, L)."""
    logits = _logits(a)
    lse = torch.logsumexp(logits, -1)
    o = (_softmax(logits, lse) * _dropout_factor(a)) @ a.v.to(lse.dtype)
    if a.head_scale is not None:
        o = o * a.head_scale.to(lse.dtype)[:, None, None]
    return o.to(a.q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    do: Tensor,
    a: Inputs,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv in place; return dbias and dhead_scale (empty where not asked for).

    With s = scale q.k + bias, p = softmax(s), m the dropout factor, g the head's scale and
    o = g (p m) v: dv = g (p m)^T do, dg = sum (p m)^T do * v, dp = g m (do v^T),
    ds = p (dp - rowsum(p dp)), dq = scale ds k, dk = scale ds^T q, dbias = ds.
    """
    q, k, v, do = (t.to(lse.dtype) for t in (a.q, a.k, a.v, do))
    p, factor = _softmax(_logits(a), lse), _dropout_factor(a)
    dv_plain = (p * factor).mT @ do
    dp = (do @ v.mT) * factor
    dhead_scale = a.q.new_empty(0)
    if a.head_scale is not None:
        g = a.head_scale.to(lse.dtype)[:, None, None]
        dhead_scale = (dv_plain * v).sum((0, 2, 3)).to(a.head_scale.dtype)
        dv_plain, dp = dv_plain * g, dp * g
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq.copy_(ds @ k * a.scale)
    dk.copy_(ds.mT @ q * a.scale)
    dv.copy_(dv_plain)
    if a.bias is None or not bias_grad:
        return a.q.new_empty(0), dhead_scale
    return ds.sum_to_size(a.bias.shape).to(a.bias.dtype), dhead_scale


def attention_weights(a: Inputs) -> tuple[Tensor, Tensor]:
    """Mean over the heads of the dropped softmax weights, (B, L, S), and log-sum-exp (B, H, L).

    A few heads at a time, so that memory stays at a few (B, L, S).
    """
    B, H, L, S = *a.q.shape[:3], a.k.shape[2]
    lse = a.q.new_empty(B, H, L, dtype=torch.promote_types(a.q.dtype, torch.float32))
    total = lse.new_zeros(B, L, S)
    for part, heads, factor in _head_groups(a):
        logits = _logits(heads)
        lse[:, part] = torch.logsumexp(logits, -1)
        total += (_softmax(logits, lse[:, part]) * factor).sum(1)
    return (total / H).to(a.q.dtype), lse


def attention_with_weights(a: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` and `attention_weights` with the same dropout: o, weights, log-sum-exp."""
    o, lse = attention(a)
    return o, attention_weights(a)[0], lse


def attention_weights_backward(
    dweights: Tensor, a: Inputs, lse: Tensor, bias_grad: bool, dq: Tensor, dk: Tensor
) -> Tensor:
    """Write dq and dk in place, a few heads at a time; return dbias (empty where not asked for).

    As in `attention_backward` with dp = m dweights / H.
    """
    dw = dweights.to(lse.dtype)[:, None] / a.q.shape[1]
    bias = a.bias if bias_grad else None
    dbias = lse.new_zeros(0 if bias is None else bias.shape)
    for part, heads, factor in _head_groups(a):
        p, dp = _softmax(_logits(heads), lse[:, part]), dw * factor
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[:, part] = ds @ heads.k.to(lse.dtype) * a.scale
        dk[:, part] = ds.mT @ heads.q.to(lse.dtype) * a.scale
        if bias is not None:
            here = _of_heads(dbias, part)
            here += ds.sum_to_size(here.shape)
    return dbias.to((a.q if bias is None else bias).dtype)


def _head_groups(a: Inputs):
    """Slices of the heads, the same for every batch size, their inputs and dropout factor."""
    for h in range(0, a.q.shape[1], HEADS_AT_ONCE):
        part = slice(h, h + HEADS_AT_ONCE)
        q, k, v, bias = (_of_heads(t, part) for t in (a.q, a.k, a.v, a.bias))
        yield part, a._replace(q=q, k=k, v=v, bias=bias), _dropout_factor(a, part)


def _of_heads(t, part: slice):
    """The part of a (B, H or 1, ...) tensor that some heads see."""
    return t if t is None or t.shape[1] == 1 else t[:, part]


def keep_mask(
    seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float, part: slice = slice(None)
) -> Tensor:
    """Which weights (B, H, L, S) survive dropout: a function of (seed, b H + h, i, j) alone.

    With `part`, of those heads only.

    One Philox 4x32 call gives 16 random bits to each of 8 keys: call c of query i serves the keys
    j with 8 (j // 64) + j % 8 = c, and the key's half-word is number (j // 8) % 8. Keys of one
    call are 8 apart because that is how the tensor-core layout hands scores to a thread.
    """
    B, H, L, S = shape
    calls, threshold = (S + 63) // 64 * 8, dropout_rule(dropout_p)[0]
    c2, c1, c0 = (torch.arange(n, device=seed.device) for n in (B * H, L, calls))
    c2 = c2.view(B, H)[:, part].flatten()
    words = _philox(seed, (c0, c1[:, None], c2[:, None, None], torch.zeros_like(c0)))
    keep = [k for w in words for k in ((w & 0xFFFF) >= threshold, w >> 16 >= threshold)]
    by_key = torch.stack([k.unflatten(-1, (-1, 8)) for k in keep], -2)  # (B H, L, S / 64, 8, 8)
    return by_key.flatten(2)[..., :S].unflatten(0, (B, -1))


def _philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(PHILOX_ROUNDS):
        # the product wraps modulo 2^64, which keeps all its bits
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & low ^ c1 ^ k0, b & low, (a >> 32) & low ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _dropout_factor(a: Inputs, part: slice = slice(None)) -> Tensor | float:
    if a.seed is None:
        return 1.0
    factor = dropout_rule(a.dropout_p)[1]
    return keep_mask(a.seed, (*a.q.shape[:3], a.k.shape[2]), a.dropout_p, part) * factor


def _logits(a: Inputs) -> Tensor:
    acc = torch.promote_types(a.q.dtype, torch.float32)
    logits = a.q.to(acc) @ a.k.to(acc).mT * a.scale
    if a.bias is not None:
        logits = logits + a.bias.to(acc)
    if a.key_mask is not None:
        logits = logits.masked_fill(~a.key_mask[:, None, None, :], -torch.inf)
    return logits


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse); a row without keys has lse = -inf and gives zeros."""
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
