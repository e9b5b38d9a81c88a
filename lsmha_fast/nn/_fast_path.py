"""Keeps PyTorch's fused encoder layer from skipping a subclass of `nn.MultiheadAttention`.

In evaluation `nn.TransformerEncoderLayer` reads the weights of its attention and runs one fused
function instead of calling it. It does not where any of its modules has a forward hook, so a hook
that does nothing is registered; should somebody remove it, an error takes the place of silence.
"""

from __future__ import annotations

from torch import nn


def _call_forward(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook that does nothing; at module level, so that it pickles."""


def forbid_fast_path(module: nn.Module) -> None:
    """Make `nn.TransformerEncoderLayer` call `module` in evaluation, too."""
    module.register_forward_pre_hook(_call_forward)


class NoFastPath:
    """Mixin: an error where the fused encoder layer is about to skip this module."""

    def merge_masks(self, attn_mask, key_padding_mask, query):
        """The last method that the fused layer calls before it goes its own way."""
        raise RuntimeError(
            f"the fused path of nn.TransformerEncoderLayer would skip {type(self).__name__}, "
            "because its forward pre-hook was removed; keep that hook, or call "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )
