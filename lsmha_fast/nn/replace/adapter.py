"""What every adapter shares: how a module changes class, and the one call to the ops.

An adapter is a forward of its own for a class that somebody else wrote. A swapped module becomes
an instance of a new class, (adapter, original class), as `torch.nn.utils.parametrize` does it: its
parameters, buffers, hooks, state_dict keys, methods and identity stay, so an optimizer made before
and checkpoints of the original go on to work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops import attention, attention_packed


class Adapter:
    """Base of the adapters: a mixin in front of the original class."""

    # parameters and children that the forward knows; anything else is a reason to refuse
    PARTS: frozenset[str] = frozenset()
    CLASSES: frozenset[str] = frozenset()
    PACKAGE = ""  # first part of the original's module path, "" for any
    backend: str | None = None
    if TYPE_CHECKING:  # the attributes of the original class

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether `module` is of a class that this adapter was written for."""
        path = type(module).__module__
        known = not cls.PACKAGE or path == cls.PACKAGE or path.startswith(cls.PACKAGE + ".")
        return known and type(module).__name__ in cls.CLASSES and cls.has_parts(module)

    @classmethod
    def has_parts(cls, module: nn.Module) -> bool:
        """Whether the attributes that tell one "Attention" from another are there."""
        return True

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this one module of the class cannot be swapped, or None."""
        return None

    @classmethod
    def example(cls, module) -> tuple:
        """Shape of an input to compare both forwards on."""
        return 2, 7, module.qkv.in_features

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        """(num_heads, channels of a query)."""
        return module.num_heads, module.qkv.out_features // (3 * module.num_heads)

    def __reduce_ex__(self, protocol):
        adapter, original = type(self).__bases__
        return _blank, (adapter, original), self.__dict__


_classes: dict[tuple[type, type], type] = {}


def swapped_class(adapter: type, original: type) -> type:
    """The class (adapter, original); the same object for the same pair."""
    if (adapter, original) not in _classes:
        _classes[adapter, original] = _make_class(adapter, original)
    return _classes[adapter, original]


def _make_class(adapter: type, original: type) -> type:
    return type(f"LS{original.__name__}", (adapter, original), {"__module__": __name__})


def _blank(adapter: type, original: type) -> object:
    """An instance without state, for pickle and deepcopy."""
    return object.__new__(swapped_class(adapter, original))


def dropout_p(module, name: str = "attn_drop") -> float:
    """Probability of a module's dropout layer of the attention weights, 0 in evaluation."""
    layer = getattr(module, name, None)
    return float(layer.p) if module.training and isinstance(layer, nn.Dropout) else 0.0


def sdpa_bias(mask: Tensor | None, is_causal: bool, x: Tensor, num_tokens: int) -> Tensor | None:
    """The mask of `scaled_dot_product_attention` (bool: True takes part) as an additive bias.

    Args:
        mask: broadcastable to (B, H, N, N), or None.
        is_causal: a causal mask in place of `mask`.
        x: gives dtype and device.
        num_tokens: N.
    """
    if is_causal:
        return x.new_full((num_tokens, num_tokens), float("-inf")).triu_(1)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return x.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def attend_packed(module, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, N, 3 H D) -> (B, N, H D)."""
    qkv = qkv.unflatten(-1, (3, module.num_heads, -1))
    return attention_packed(
        qkv, bias=bias, dropout_p=dropout_p(module), scale=module.scale, backend=module.backend
    ).flatten(-2)


def attend(
    module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """(B, H, L, D), (B, H, S, D), (B, H, S, E) -> (B, L, H E).

    Queries and values of different width are brought to one by zeros, which change no score.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms under autocast give float32
    scale = module.scale if scale is None else scale
    width, out_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (_widen(t, width) for t in (q, k, v))
    out = attention(
        q, k, v, bias=bias, dropout_p=dropout_p(module), scale=scale, backend=module.backend
    )
    return out.transpose(1, 2)[..., :out_width].flatten(-2)


def _widen(t: Tensor, width: int) -> Tensor:
    missing = width - t.shape[-1]
    return nn.functional.pad(t, (0, missing)) if missing else t
