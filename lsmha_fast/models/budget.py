"""What a block costs, and the width at which convolutions cost as much as attention."""

from __future__ import annotations

from bisect import bisect_left

from ..nn.blocks import conv_layers

BUDGETS = ("params", "macs")


def encoder_block_cost(
    kind: str, dim: int, num_tokens: int, *, attn_dim: int | None = None, mlp_ratio: float = 2.0
) -> int:
    """Parameters, or multiply-adds per image, of an `EncoderBlock` (the softmax is not counted).

    Args:
        kind: "params" or "macs".
        dim: channels C of a token.
        num_tokens: N.
        attn_dim: heads x channels of a head; `dim` by default.
        mlp_ratio: hidden channels of the MLP over `dim`.

    Raises:
        ValueError: an unknown kind.
    """
    _check(kind)
    width, hidden = attn_dim or dim, int(dim * mlp_ratio)
    if kind == "macs":
        return encoder_block_macs(dim, width, hidden, num_tokens)
    biases, norms = 2 * dim + hidden, 4 * dim
    return _matrices(dim, width, hidden) + biases + norms


def encoder_block_macs(dim: int, attn_dim: int, hidden: int, num_tokens: int) -> int:
    """Multiply-adds of an `EncoderBlock` for one image, the products of attention included."""
    return num_tokens * _matrices(dim, attn_dim, hidden) + 2 * num_tokens**2 * attn_dim


def _matrices(dim: int, attn_dim: int, hidden: int) -> int:
    return 4 * dim * attn_dim + 2 * dim * hidden


def conv_block_cost(
    kind: str, form: str, dim: int, num_tokens: int, hidden: int | None = None, kernel_size: int = 3
) -> int:
    """Parameters, or multiply-adds per image, of a `ConvBlock`; BatchNorm folds away in the latter.

    Raises:
        ValueError: an unknown kind or form, or a width below 1.
    """
    _check(kind)
    layers = conv_layers(form, dim, hidden, kernel_size)
    if kind == "macs":
        return num_tokens * sum(layer.weights for layer in layers)
    return sum(layer.weights + 2 * layer.outputs for layer in layers)


def equal_conv_hidden(
    kind: str,
    form: str,
    dim: int,
    num_tokens: int,
    *,
    attn_dim: int | None = None,
    mlp_ratio: float = 2.0,
    kernel_size: int = 3,
) -> int:
    """The `hidden` of a `ConvBlock` whose cost is nearest to that of the block it replaces.

    Raises:
        ValueError: an unknown kind or form.
    """
    target = encoder_block_cost(kind, dim, num_tokens, attn_dim=attn_dim, mlp_ratio=mlp_ratio)

    def cost(hidden: int) -> int:
        return conv_block_cost(kind, form, dim, num_tokens, hidden, kernel_size)

    at_least = bisect_left(range(1, target + 1), target, key=cost) + 1
    return min((max(at_least - 1, 1), at_least), key=lambda hidden: abs(cost(hidden) - target))


def _check(kind: str) -> None:
    if kind not in BUDGETS:
        raise ValueError(f"the budget must be one of {', '.join(BUDGETS)}, got {kind!r}")
