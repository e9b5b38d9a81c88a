"""What is measured in a model: the heads of its attention, or its single nodes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from ..models import CCT
from ..nn import EncoderBlock, LSMultiHeadAttention
from ..nn.replace.adapter import Adapter

KINDS = ("heads", "head_nodes", "mlp_in", "mlp", "block", "final")


class Tap(NamedTuple):
    """Where a model is listened to: the input or output of one module."""

    name: str
    module: nn.Module
    output: bool = False
    heads: int | None = None  # None: every channel is a unit of its own
    batch_first: bool = True


class UnitView(nn.Module):
    """A model whose `forward_with_heads` gives other units than its heads.

    All of this package measures heads (B, N, H, D); a node is a head of one channel, so that the
    single-nodal performance (SNP) of all nodes is `single_head_performance(UnitView(model, "mlp"),
    ...)`, from one pass of the model, whatever kinds are asked for.

    | kind | units |
    |---|---|
    | heads | heads of every attention: input of its output projection, (B, N, H, D) |
    | head_nodes | their channels, (B, N, H * D, 1) |
    | mlp_in, mlp | channels that enter an MLP, and its hidden nodes |
    | block | channels of the tokens after every block (of `EncoderBlock`s) |
    | final | channels of the tokens before the last pooling (of a `CCT`) |

    Args:
        model: gives logits (B, K). Its attention computes with `lsmha_fast`: a CCT, or any model
            after `replace_attention(model)`. MLPs are modules with `linear1` and `linear2` or
            `fc1` and `fc2`, or an `nn.Sequential` of two linear layers and what has no weights.
        *kinds: of the table; blocks come kind after kind.

    Raises:
        ValueError: an unknown kind, or a model without such units.
    """

    def __init__(self, model: nn.Module, *kinds: str):
        super().__init__()
        self.model = model
        self.taps: list[Tap] = []
        for kind in kinds or ("heads",):
            found = list(_taps(model, kind))
            if not found:
                raise ValueError(f"{type(model).__name__} {_WHY.get(kind, f'has no {kind} units')}")
            known = getattr(model, "block_names", ())
            names = known if len(known) == len(found) else [t.name for t in found]
            several = f" {kind}" if len(kinds) > 1 else ""
            self.taps += [t._replace(name=n + several) for t, n in zip(found, names, strict=True)]

    @property
    def block_names(self) -> tuple[str, ...]:
        """One name per block and kind."""
        return tuple(tap.name for tap in self.taps)

    def forward_with_heads(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images -> logits (B, K) and the units of every block, (B, N, H, D)."""
        heard: dict[int, Tensor] = {}
        hooks = []
        for number, tap in enumerate(self.taps):
            hear = partial(_hear, heard, number, tap.name)
            if tap.output:
                hooks.append(tap.module.register_forward_hook(lambda m, x, y, hear=hear: hear(y)))
            else:
                hooks.append(
                    tap.module.register_forward_pre_hook(lambda m, x, hear=hear: hear(x[0]))
                )
        try:
            logits = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, tuple(
            _units(heard.get(n), tap, len(images)) for n, tap in enumerate(self.taps)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images)


def _hear(heard: dict[int, Tensor], number: int, name: str, x: Tensor) -> None:
    if number in heard:
        raise ValueError(f"{name} runs twice in one pass; its units cannot be told apart")
    heard[number] = x.detach()


def _units(x: Tensor | None, tap: Tap, images: int) -> Tensor:
    """(B, N, H, D) of what was heard."""
    if x is None:
        raise ValueError(f"{tap.name} did not run as a module, so its units cannot be read")
    x = x if tap.batch_first else x.transpose(0, 1)
    if x.ndim != 3 or len(x) != images:
        raise ValueError(
            f"{tap.name} gives tokens {tuple(x.shape)} for {images} images, expected ({images}, N, "
            "C); attention in windows cannot be measured"
        )
    return x.unflatten(2, (tap.heads or x.shape[2], -1))


_WHY = {
    "heads": "has no forward_with_heads and no attention that computes with lsmha_fast; "
    "call replace_attention(model) first, see docs/shp.md",
    "head_nodes": "has no attention that computes with lsmha_fast; call replace_attention(model)",
}


def _taps(model: nn.Module, kind: str) -> Iterator[Tap]:
    if kind not in KINDS:
        raise ValueError(f"unknown units {kind!r}; choose from {', '.join(KINDS)}")
    number = 0
    for module in model.modules():
        found = None
        if kind in ("heads", "head_nodes"):
            found = _attention_tap(module, kind == "heads")
        elif kind in ("mlp_in", "mlp"):
            found = _mlp_tap(module, kind == "mlp")
        elif kind == "block" and isinstance(module, EncoderBlock):
            found = Tap("", module, output=True)
        elif kind == "final" and module is model and isinstance(model, CCT):
            found = Tap("", model.pool)
        if found is not None:
            number += 1
            yield found._replace(name=f"block {number}" if kind != "final" else "final")


def _attention_tap(module: nn.Module, by_head: bool) -> Tap | None:
    if isinstance(module, LSMultiHeadAttention):
        return Tap("", module.out_proj, heads=module.num_heads if by_head else None)
    if not isinstance(module, Adapter):
        return None
    for name in ("proj", "to_out"):
        if isinstance(projection := getattr(module, name, None), nn.Module):
            heads = type(module).sizes(module)[0]
            return Tap("", projection, heads=heads if by_head else None)
    return None


def _mlp_tap(module: nn.Module, hidden: bool) -> Tap | None:
    layers: list[nn.Module] = []
    for pair in (("linear1", "linear2"), ("fc1", "fc2")):
        if all(isinstance(getattr(module, n, None), nn.Linear) for n in pair):
            layers = [getattr(module, n) for n in pair]
    if isinstance(module, nn.Sequential):
        layers = [m for m in module if isinstance(m, nn.Linear)]
    fits = len(layers) == 2 and layers[0].out_features == layers[1].in_features
    if not fits:
        return None
    attention = getattr(module, "self_attn", None)  # of an nn.TransformerEncoderLayer
    batch_first = isinstance(module, EncoderBlock) or getattr(attention, "batch_first", True)
    return Tap("", layers[1] if hidden else layers[0], batch_first=batch_first)
