"""Models of other libraries, with the heads of every block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

# what libraries call the output projection, and the number of heads
_PROJECTIONS = ("proj", "to_out", "out_proj")
_NUMBERS = ("num_heads", "heads")


class HeadOutput(NamedTuple):
    """Logits (B, K), and per block its heads' outputs (B, N, H, D)."""

    logits: Tensor
    heads: tuple[Tensor, ...]


class WithHeads(nn.Module):
    """A model whose attention modules end in a linear projection, with `forward_with_heads`.

    The input of the projection is the concatenated heads, so it is read there and nothing of the
    model is changed: timm's ViT, DeiT, BEiT, EVA and the like, vit-pytorch's, and every model of
    `torch.nn.MultiheadAttention` after `replace_attention(model)`. Class tokens and registers are
    tokens like all others. Attention within windows has other tokens than the image and is refused.

    Args:
        model: images -> logits (B, K).

    Raises:
        ValueError: no attention module with a linear output projection.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        found = dict(_projections(model))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no attention module with a number of heads "
                f"({' or '.join(_NUMBERS)}) and a linear output projection "
                f"({', '.join(_PROJECTIONS)})"
            )
        self.block_names = tuple(found)
        self._found = tuple(found.values())

    def forward(self, images: Tensor) -> Tensor:
        """What the model gives."""
        return self.model(images)

    def forward_with_heads(self, images: Tensor) -> HeadOutput:
        """The model's logits, and the heads (B, N, H, D) of its attention modules, in their order.

        Raises:
            ValueError: a module that was not called once, or not with the tokens of the images.
        """
        heads: list[list[Tensor]] = [[] for _ in self._found]
        with contextlib.ExitStack() as hooks:
            for (projection, number), kept in zip(self._found, heads, strict=True):

                def keep(_, inputs, number=number, kept=kept):
                    kept.append(inputs[0].unflatten(-1, (number, -1)))

                hooks.callback(projection.register_forward_pre_hook(keep).remove)
            logits = self.model(images)
        for name, kept in zip(self.block_names, heads, strict=True):
            if len(kept) != 1:
                raise ValueError(
                    f"the output projection of {name} was called {len(kept)} times for one batch, "
                    "expected once; replace_attention(model) makes torch's own attention call it"
                )
            if kept[0].ndim != 4 or len(kept[0]) != len(images):
                raise ValueError(
                    f"{name} gives heads {tuple(kept[0].shape)} for {len(images)} images, expected "
                    "(images, tokens, heads, channels); attention within windows has no such heads"
                )
        return HeadOutput(logits, tuple(kept[0] for kept in heads))


def _projections(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Linear, int]]]:
    """Name of every attention module -> its output projection and its number of heads."""
    for name, module in model.named_modules():
        number = next((getattr(module, n) for n in _NUMBERS if hasattr(module, n)), None)
        layer = next((getattr(module, n) for n in _PROJECTIONS if hasattr(module, n)), None)
        if isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[0]  # vit-pytorch puts a dropout behind it
        if not isinstance(number, int) or number < 1 or not isinstance(layer, nn.Linear):
            continue
        if layer.in_features % number == 0:
            yield name or "model", (layer, number)
