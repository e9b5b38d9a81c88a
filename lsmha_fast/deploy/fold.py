"""Exact algebra of inference: what stands before or after a linear map goes into its weights.

Every function computes in fp64 and returns fp64, so that a folded weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import LSMultiHeadAttention, SeqPool


class Affine(NamedTuple):
    """Weight and bias of a linear map or convolution, fp64."""

    weight: Tensor
    bias: Tensor | None


class HeadProjections(NamedTuple):
    """Projections of an attention layer, and how many heads they feed."""

    qkv: Affine  # weight (3 H D, C)
    proj: Affine  # weight (C, H D)
    num_heads: int


class Classifier(NamedTuple):
    """Weights behind the normalisation without affine: pooling scores (1, C) and logits (K, C)."""

    pool: Tensor
    fc: Affine


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


def affine_of(layer: nn.Linear | nn.Conv2d) -> Affine:
    """Weight and bias of a layer in fp64."""
    return Affine(layer.weight.detach().double(), _wide(layer.bias))


def norm_into_linear(norm: nn.LayerNorm, linear: Affine) -> Affine:
    """W (g x + b) + c = (W diag(g)) x + (W b + c): LayerNorm's affine part goes into what follows.

    Exact only where nothing else reads the output of `norm`.
    """
    weight, bias = linear
    shift = weight @ norm.bias.detach().double()
    return Affine(weight * norm.weight.detach().double(), shift if bias is None else shift + bias)


def batch_norm_into_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Affine:
    """BatchNorm with running statistics after a convolution, as the convolution's weight and bias.

    Raises:
        ValueError: `norm` keeps no running statistics, so its inference depends on the batch.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("optimize: a BatchNorm without running statistics cannot be folded")
    weight, bias = affine_of(conv)
    factor = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.detach().double()
    shift = norm.bias.detach().double() - norm.running_mean.double() * factor
    return Affine(
        weight * factor[:, None, None, None], shift if bias is None else shift + bias * factor
    )


def scale_into_query(qkv: Affine, head_dim: int) -> Affine:
    """Multiply the rows of the queries by D^-0.5, the factor of the logits."""
    rows = len(qkv.weight) // 3
    factor = torch.ones(len(qkv.weight), dtype=torch.float64, device=qkv.weight.device)
    factor[:rows] = head_dim**-0.5
    return Affine(qkv.weight * factor[:, None], None if qkv.bias is None else qkv.bias * factor)


def without_silent_heads(attn: LSMultiHeadAttention) -> HeadProjections:
    """Projections of the heads that the output can depend on.

    A head is silent where all its columns of the output projection are zero, which is what
    pruning a head leaves behind. One head always stays.
    """
    qkv, proj = Affine(attn.in_proj_weight, attn.in_proj_bias), affine_of(attn.out_proj)
    H, D = attn.num_heads, attn.head_dim
    heard = proj.weight.unflatten(1, (H, D)).ne(0).any(2).any(0)  # (H,)
    heard[0] |= not heard.any()

    def rows(t: Tensor) -> Tensor:
        return t.detach().double().unflatten(0, (3, H, D))[:, heard].flatten(0, 2)

    kept = proj.weight.unflatten(1, (H, D))[:, heard].flatten(1)
    bias = None if qkv.bias is None else rows(qkv.bias)
    return HeadProjections(
        Affine(rows(qkv.weight), bias), Affine(kept, proj.bias), int(heard.sum())
    )


def norm_into_classifier(norm: nn.LayerNorm, pool: SeqPool, fc: nn.Linear) -> Classifier:
    """The final LayerNorm's affine part, through the pooling, into pooling scores and logits.

    Scores w.(g x + b) differ from (w g).x by a constant, which the softmax over tokens cancels;
    weights that add up to one carry g and b through the weighted sum to `fc`.
    """
    scores = pool.weight.detach().double() * norm.weight.detach().double()
    return Classifier(scores, norm_into_linear(norm, affine_of(fc)))


def input_into_stem(stem: Affine, mean: Sequence[float], std: Sequence[float]) -> Affine:
    """Take bytes: (x / 255 - mean) / std goes into the first convolution, exact at the borders.

    The mean cannot go into the bias, for at the border fewer taps see it: the padding is zero
    after normalisation. It becomes the weight of one more input channel, which holds ones inside
    the image and is padded with zeros like the others.
    """
    weight, bias = stem
    if len(mean) != weight.shape[1] or len(std) != weight.shape[1]:
        raise ValueError(
            f"optimize: expected mean and std of {weight.shape[1]} channels, got {mean=} {std=}"
        )
    if min(std) <= 0:
        raise ValueError(f"optimize: std must be above 0, got {std}")
    m, s = (
        torch.tensor(v, dtype=torch.float64, device=weight.device)[:, None, None]
        for v in (list(mean), list(std))
    )
    ones = -(weight * (m / s)).sum(1, keepdim=True)  # (C, 1, k, k)
    return Affine(torch.cat([weight / (255 * s), ones], 1), bias)
