"""`replace_attention`: find the attention modules of a model, check each, swap its class."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from ..attention import LSMultiHeadAttention
from .account import Account, Skip, Swap
from .adapter import Adapter, swapped_class
from .levit import CascadedAttention, LevitAttention, LevitDownsample, TinyViTAttention
from .rotary import RotaryAttention
from .vit import (
    CCTAttention,
    ClassAttention,
    PackedAttention,
    RelPosAttention,
    ViTPytorchAttention,
)
from .windows import BeitAttention, SwinAttention, SwinV2Attention

# classes of one module path come before those that any path may hold
ADAPTERS: tuple[type[Adapter], ...] = (
    BeitAttention,
    SwinAttention,
    SwinV2Attention,
    LevitAttention,
    LevitDownsample,
    TinyViTAttention,
    CascadedAttention,
    RotaryAttention,
    RelPosAttention,
    ClassAttention,
    PackedAttention,
    CCTAttention,
    ViTPytorchAttention,
)
# what is called attention and cannot be computed by softmax attention of separate heads
OTHER_KINDS = {
    "TalkingHeadAttn": "it mixes the heads before and after the softmax",
    "XCA": "it attends over channels, not tokens",
    "LiteMLA": "its attention is linear, without a softmax",
    "OutlookAttention": "its weights come from one token, not from products",
    "FactorAttnConvRelPosEnc": "its attention is linear, without a softmax",
    "DiffAttention": "it subtracts one softmax from another",
}
_LOOKS_LIKE_ATTENTION = re.compile(r"Attn|Attention|^XCA$|^LiteMLA$|^MHA$")
# differences between two ways to compute one attention; a wrong adapter is off by far more
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def replace_attention(
    model: nn.Module, *, backend: str | None = None, verbose: bool = False
) -> Account:
    """Let the attention modules of a model compute with `lsmha_fast.ops`, in place.

    Swapped are `nn.MultiheadAttention` (so torchvision's ViT and `nn.Transformer`), the attention
    of timm's ViT, DeiT, PiT, CaiT (class attention), EVA, BEiT, Swin, Swin v2, LeViT, TinyViT and
    EfficientViT (MSRA) models and of its relative-position ViTs, that of the published CCT code,
    and that of vit-pytorch's plain ViTs. A module changes its class and nothing else: parameters,
    state_dict keys, hooks and optimizers stay. Each is first run on random numbers with its old
    and its new forward; where the two differ, or where it does more than an adapter knows, it is
    left as it is and `skipped` of the result says why.

    Args:
        model: any module; one that is itself an attention module will do.
        backend: see `lsmha_fast.ops.attention`.
        verbose: print the account.

    Returns:
        The list of swaps (name, origin, num_heads, head_dim), with `skipped`, a list of
        (name, origin, reason). Fully masked queries give zeros in all that was swapped.
    """
    account = Account()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or isinstance(module, (LSMultiHeadAttention, Adapter)):
            continue
        origin = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, nn.MultiheadAttention):
            seen.update(id(m) for m in module.modules())
            result = _swap_torch(module, backend)
        elif (adapter := next((a for a in ADAPTERS if a.takes(module)), None)) is not None:
            seen.update(id(m) for m in module.modules())
            result = _swap(module, adapter, backend)
        elif _is_unknown_attention(module):
            result = OTHER_KINDS.get(type(module).__name__, "no adapter knows this class")
        else:
            continue
        if isinstance(result, str):
            account.skipped.append(Skip(name, origin, result))
        else:
            account.append(Swap(name, origin, *result))
    if verbose:
        print(account)
    return account


def _is_unknown_attention(module: nn.Module) -> bool:
    """Named like attention, with parameters, and the innermost of such modules."""
    inner = list(module.modules())[1:]
    return (
        _LOOKS_LIKE_ATTENTION.search(type(module).__name__) is not None
        and next(module.parameters(), None) is not None
        and not any(
            _LOOKS_LIKE_ATTENTION.search(type(m).__name__) or isinstance(m, Adapter) for m in inner
        )
    )


def _swap_torch(module: nn.MultiheadAttention, backend: str | None) -> tuple[int, int] | str:
    if type(module) is not nn.MultiheadAttention:
        return "it is a subclass of nn.MultiheadAttention with a behaviour of its own"
    LSMultiHeadAttention.adopt(module, backend)
    return module.num_heads, module.head_dim


def _swap(module: nn.Module, adapter: type[Adapter], backend: str | None) -> tuple[int, int] | str:
    """Change the class of one module, or say why not."""
    reason = _unknown_parts(module, adapter) or adapter.refuses(module)
    if reason is not None:
        return reason
    original = type(module)
    if any(t.is_meta for t in module.state_dict().values()):
        return "it is on the meta device, where the swap cannot be checked; load the weights first"
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        x = _example(module, adapter)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            expected = original.forward(module, x)
            module.__class__ = swapped_class(adapter, original)
            module.backend = backend  # type: ignore[assignment]
            actual = adapter.forward(module, x)  # type: ignore[attr-defined]
        sizes = adapter.sizes(module)
        same = actual.shape == expected.shape and _distance(actual, expected) <= _SAME[x.dtype]
        reason = None if same else "its output differs from what its parts are known to compute"
    except Exception as error:
        reason = f"it could not be run for comparison: {str(error).splitlines()[0]}"
    finally:
        for m, mode in modes:
            m.training = mode
    if reason is not None:
        module.__class__ = original
        module.__dict__.pop("backend", None)
        return reason
    return sizes


def _unknown_parts(module: nn.Module, adapter: type[Adapter]) -> str | None:
    """Why the module does more than the adapter knows, or None."""
    holds = {n for n, child in module.named_children() if any(True for _ in child.parameters())}
    holds |= set(module._parameters) - {n for n, p in module._parameters.items() if p is None}
    if unknown := sorted(holds - adapter.PARTS):
        return f"no adapter knows its {', '.join(unknown)}"
    theirs = inspect.signature(type(module).forward).parameters
    ours = inspect.signature(adapter.forward).parameters  # type: ignore[attr-defined]
    if more := [n for n in theirs if n not in ours]:
        return f"no adapter knows the {', '.join(more)} of its forward"
    return None


def _example(module: nn.Module, adapter: type[Adapter]) -> Tensor:
    """A random input for the comparison; the caller's random numbers are left alone."""
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(adapter.example(module), generator=generator).to(like.device, like.dtype)


def _distance(actual: Tensor, expected: Tensor) -> float:
    size = expected.double().abs().max().clamp_min(1e-300)
    return float((actual.double() - expected.double()).abs().max() / size)
