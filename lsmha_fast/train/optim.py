"""Optimiser and precision of a run."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .config import TrainConfig


def make_optimizer(
    model: nn.Module, config: TrainConfig, lr: Tensor | None = None
) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms) are not decayed, as in timm and the published recipe.

    Args:
        model: whose parameters are trained.
        config: of the run.
        lr: learning rate, () on the parameters' device, of all groups, for callers who change it in
            place; `config.lr` by default.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        groups,
        lr=config.lr if lr is None else lr,
        betas=betas,
        eps=config.eps,
        fused=True,
        capturable=lr is not None and lr.is_cuda,
    )


def pick_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for full precision.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU; on {device.type} use bf16 or off")
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Autocast on `device`, or nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
