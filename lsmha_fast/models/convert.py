"""Published CCT checkpoints -> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# key of SHI-Labs/Compact-Transformers -> ours; the tensors are the same
_RENAMES = (
    (r"tokenizer\.conv_layers\.(\d+)\.0\.weight", r"stem.convs.\1.weight"),
    (r"classifier\.positional_emb", "positional_emb"),
    (r"classifier\.attention_pool\.(weight|bias)", r"pool.\1"),
    (r"classifier\.(norm|fc)\.(weight|bias)", r"\1.\2"),
    (r"classifier\.blocks\.(\d+)\.self_attn\.qkv\.weight", r"blocks.\1.self_attn.in_proj_weight"),
    (
        r"classifier\.blocks\.(\d+)\.self_attn\.proj\.(weight|bias)",
        r"blocks.\1.self_attn.out_proj.\2",
    ),
    (
        r"classifier\.blocks\.(\d+)\.(pre_norm|norm1|linear1|linear2)\.(weight|bias)",
        r"blocks.\1.\2.\3",
    ),
)


def from_compact_transformers(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the parameters of a published CCT so that `CCT.load_state_dict` takes them.

    Heads own the same consecutive columns of q, k and v there and here, so the tensors are
    unchanged and any `num_heads` may be used.

    Args:
        state_dict: of a model of SHI-Labs/Compact-Transformers, or of a checkpoint that holds it
            under "state_dict".

    Returns:
        A new dict with our keys and the same tensors.

    Raises:
        ValueError: a key that no published CCT has.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    return {_rename(key): value for key, value in state_dict.items()}


def _rename(key: str) -> str:
    plain = key.removeprefix("module.")
    for pattern, ours in _RENAMES:
        if match := re.fullmatch(pattern, plain):
            return match.expand(ours)
    raise ValueError(
        f"from_compact_transformers: {key!r} is not a parameter of a published CCT "
        "(expected keys such as tokenizer.conv_layers.0.0.weight or classifier.fc.weight)"
    )
