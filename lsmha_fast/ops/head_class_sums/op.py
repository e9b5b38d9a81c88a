"""Class sums of every head's pooled vector: public function, schema, fake kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ext import cpp_check
from .._dispatch import always, impl, load_backend, resolve_backend, triton_check

CHECKS = {
    "reference": always,
    "triton": lambda x: triton_check(x, (torch.float32, torch.float16, torch.bfloat16)),
    "cpp": lambda x: cpp_check(x, (torch.float32, torch.bfloat16)),
}
# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("triton",), "cpu": ("cpp",)}

torch.library.define(
    "lsmha_fast::head_class_sums",
    "(Tensor x, Tensor weight, Tensor labels, int num_classes, str backend)"
    " -> (Tensor sums, Tensor counts)",
)


class HeadClassSums(NamedTuple):
    """Sums (K, H, D) over the images of each class, and how many images each class had (K,)."""

    sums: Tensor
    counts: Tensor


def _check_labels(labels, num_classes):
    wrong = (labels < 0) | (labels >= num_classes)
    message = f"head_class_sums: labels must be in 0..{num_classes - 1}"
    if labels.is_cuda:
        # reading the answer would wait for the device; it traps instead, as torch's indexing does
        torch._assert_async(~wrong.any(), message)
    elif wrong.any():
        raise ValueError(f"{message}, got {labels[wrong][0].item()}")


@impl("lsmha_fast::head_class_sums")
def _impl(x, weight, labels, num_classes, backend):
    _check_labels(labels, num_classes)
    return load_backend(__package__, backend).head_class_sums(x, weight, labels, num_classes)


@torch.library.register_fake("lsmha_fast::head_class_sums")
def _fake(x, weight, labels, num_classes, backend):
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_classes, *weight.shape, dtype=acc), labels.new_empty(num_classes)


_op = torch.ops.lsmha_fast.head_class_sums.default


def head_class_sums(
    x: Tensor, weight: Tensor, labels: Tensor, num_classes: int, *, backend: str | None = None
) -> HeadClassSums:
    """Sum, for every class and head, of the head's pooled vector over the images of the class.

    `sums[c, h] = sum of seq_pool(x, weight)[b, h] over images b with labels[b] == c`. The field of
    a linear classifier is linear in the pooled vector, so the K x K field matrix of head h is
    `sums[:, h] / counts[:, None] @ W_h.T`: single-head performance of all heads from one pass
    over x. Deterministic: every sum runs in batch order, whatever the number of threads.

    For analysis only: the result carries no gradient, also where the inputs require one.

    Args:
        x: tokens, (B, N, H, D), float; any strides. N >= 1; B may be 0.
        weight: score projection, (H, D).
        labels: class of each image, (B,), int64, in 0..num_classes-1.
        num_classes: K >= 1.
        backend: "reference", "triton" or "cpp"; by default the fastest one for `x.device`.

    Returns:
        HeadClassSums(sums, counts): (K, H, D) in fp32, or fp64 for fp64 tokens, and (K,) int64.
        A class without images has zeros.

    Raises:
        ValueError: shapes do not fit, the labels are not int64, a label is out of range (on CUDA a
            device-side assertion instead, so that the call need not wait), unknown backend.
        RuntimeError: the named backend cannot run this call.
    """
    if x.ndim != 4 or weight.shape != x.shape[2:] or x.shape[1] == 0:
        raise ValueError(
            "head_class_sums: expected x (B, N >= 1, H, D) and weight (H, D), "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"head_class_sums: expected int64 labels of shape ({x.shape[0]},), "
            f"got {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
        )
    if num_classes < 1:
        raise ValueError(f"head_class_sums: num_classes must be at least 1, got {num_classes}")
    order = ORDER.get(x.device.type, ())
    backend = resolve_backend("head_class_sums", backend, CHECKS, order, x)
    return HeadClassSums(*_op(x.detach(), weight.detach(), labels, num_classes, backend))
