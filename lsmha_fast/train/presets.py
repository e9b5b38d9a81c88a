"""Named training recipes: the published ones of CCT, and the networks of arXiv 2506.23832 in them.

`compact-300`, `compact-1500` and `compact-5000` are cct_7_3x1_32 on CIFAR-100 as SHI-Labs/
Compact-Transformers trains it (configs/pretrained, train.py, and the behaviour of timm behind
it); published top-1 on CIFAR-100: 80.92, 82.72 and 82.87 %, best epoch. One GPU, batch 128.
The others change one thing in `compact-300`; their accuracies are not published.
"""

from __future__ import annotations

from typing import Any

from .config import CONV_FORMS, TrainConfig

_COMPACT: dict[str, Any] = dict(
    data="cifar100",
    model="cct_7_3x1_32",
    attn_drop=0.1,
    drop_path=0.1,
    epochs=300,
    cooldown_epochs=10,
    batch_size=128,
    drop_last=True,
    lr=6e-4,
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=10.0,
    lr_per_epoch=True,
    weight_decay=0.06,
    label_smoothing=0.1,
    pipeline="device",
    flip=0.5,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    seed=42,
)
_LONG = _COMPACT | dict(model="cct_7_3x1_32_sine", weight_decay=0.05)

HEADS = (4, 8, 16, 32, 64, 128, 256)
MAX_CONV_BLOCKS = 6


def _presets() -> dict[str, dict[str, Any]]:
    presets = {
        "compact-300": _COMPACT,
        "compact-1500": _LONG | dict(epochs=1500, lr=7e-4),
        "compact-5000": _LONG | dict(epochs=5000, lr=5e-4),
    }
    for heads in HEADS:
        presets[f"heads-{heads}"] = _COMPACT | dict(num_heads=heads)
    presets["heads-100x4"] = _COMPACT | dict(num_heads=100, head_dim=4)
    for form in CONV_FORMS:
        for k in range(1, MAX_CONV_BLOCKS + 1):
            changes = dict(num_heads=64, conv_blocks=k, conv_form=form)
            presets[f"hybrid-{k}-{form}"] = _COMPACT | changes
    return presets


PRESETS = _presets()


def preset(name: str, **changes: Any) -> TrainConfig:
    """The config of a named recipe.

    Args:
        name: a key of `PRESETS`.
        **changes: fields that differ.

    Returns:
        The config, checked.

    Raises:
        ValueError: no such recipe, or a value that no run could use.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {name}")
    return TrainConfig(**PRESETS[name] | changes)
