"""Class sums of every head's pooled vector: the definition in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def head_class_sums(
    x: Tensor, weight: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Pool (B, N, H, D) tokens per head and add up each class: (K, H, D) sums and (K,) counts."""
    acc = torch.promote_types(x.dtype, torch.float32)
    score = torch.einsum("bnhd,hd->bnh", x.to(acc), weight.to(acc))
    pooled = torch.einsum("bnh,bnhd->bhd", torch.softmax(score, dim=1), x.to(acc))
    counts = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
    # sorted segments and not index_add_, which is not deterministic for floats on a GPU
    by_class = pooled[labels.argsort(stable=True)]
    return torch.segment_reduce(by_class, "sum", lengths=counts, initial=0), counts
