"""SeqPool: tokens (B, N, C) -> (B, C)."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import seq_pool


class SeqPool(nn.Linear):
    """Sequence pooling (arXiv 2104.05704); drop-in for the `attention_pool` linear of a CCT.

    Args:
        dim: channels C of a token.
        backend: see `lsmha_fast.ops.seq_pool`.
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, *, backend: str | None = None, device=None, dtype=None):
        super().__init__(dim, 1, device=device, dtype=dtype)
        # the bias cancels in the softmax; it is kept so that published checkpoints load
        self.bias.requires_grad_(False)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens (B, N, C) to (B, C), in the dtype of `x`."""
        return seq_pool(x[:, :, None], self.weight, backend=self.backend)[:, 0]
