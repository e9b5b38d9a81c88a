"""What every part of a CCT costs: parameters, multiply-adds, exponentials, activations, steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..nn import ConvBlock, EncoderBlock
from .budget import encoder_block_macs
from .cct import CCT

# what waits for one another in a transformer block: norm, qkv, scores, softmax, weighted sum,
# projection, norm, and the two products of the MLP
ENCODER_STEPS = 9
# norm, scores, softmax, weighted sum, classifier
HEAD_STEPS = 5


class Cost(NamedTuple):
    """One part of a model, for one image.

    `exps` are exponentials of attention and pooling; `activations` numbers that a part hands from
    one step to the next, apart from attention weights; `steps` products, convolutions, poolings
    and reductions that have to wait for one another (element by element operations belong to the
    step before).
    """

    name: str
    params: int
    macs: int
    exps: int
    activations: int
    steps: int


def model_costs(model: CCT) -> list[Cost]:
    """The costs of stem, blocks and head in order, and their sum as the last row.

    Args:
        model: a CCT, hybrids included.
    """
    tokens = model.grid[0] * model.grid[1]
    rows = [_stem(model)]
    for i, block in enumerate(model.blocks, start=1):
        if isinstance(block, EncoderBlock):
            rows.append(_encoder(f"block {i}", block, tokens))
        elif isinstance(block, ConvBlock):
            rows.append(_convolutions(f"block {i}", block, tokens))
    dim = model.fc.in_features
    params = sum(map(_params, (model.norm, model.pool, model.fc)))
    macs = 2 * tokens * dim + model.fc.weight.numel()
    rows.append(Cost("head", params, macs, tokens, tokens * (dim + 1) + 2 * dim, HEAD_STEPS))
    return [*rows, Cost("total", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))]


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _stem(model: CCT) -> Cost:
    macs = activations = steps = 0
    height = width = model.img_size
    for conv in model.stem.convs:
        k, pad, stride = conv.kernel_size[0], model.stem.padding, model.stem.stride
        rows, cols = ((n + 2 * pad - k) // stride + 1 for n in (height, width))
        macs += rows * cols * conv.weight.numel()
        height, width = model.stem._layer_grid(height, width)
        activations += (rows * cols + height * width) * conv.out_channels
        steps += 2  # convolution, pooling
    embedding = model.positional_emb
    learned = embedding.numel() if isinstance(embedding, nn.Parameter) else 0
    return Cost("stem", _params(model.stem) + learned, macs, 0, activations, steps)


def _encoder(name: str, block: EncoderBlock, tokens: int) -> Cost:
    attn = block.self_attn
    dim, hidden, width = attn.embed_dim, block.linear1.out_features, attn.num_heads * attn.head_dim
    macs = encoder_block_macs(dim, width, hidden, tokens)
    # norm, q k v, heads, projection, norm, hidden, output
    activations = tokens * (4 * dim + 4 * width + hidden)
    kind = f"{name}: {attn.num_heads} heads of {attn.head_dim}"
    exps = attn.num_heads * tokens**2
    return Cost(kind, _params(block), macs, exps, activations, ENCODER_STEPS)


def _convolutions(name: str, block: ConvBlock, tokens: int) -> Cost:
    macs = tokens * sum(conv.weight.numel() for conv in block.convs)
    activations = tokens * sum(conv.out_channels for conv in block.convs)
    shapes = ", ".join(
        f"{'depthwise ' if conv.groups > 1 else ''}{conv.kernel_size[0]} x {conv.kernel_size[1]}"
        for conv in block.convs
    )
    return Cost(f"{name}: {shapes}", _params(block), macs, 0, activations, len(block.convs))
