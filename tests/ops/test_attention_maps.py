"""Index maps of the CUDA kernels of attention: which element of which matrix every word is.

Every word of every lane is compared with the matrix that the operand shall be, by the places that
the PTX manual gives it; dropout's masks with the reference's bits.
"""

import sys
from pathlib import Path

import pytest
import torch
from attention_rounding import split_half, split_single, truncated

from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.common import dropout_rule

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/cuda"), str(ROOT / "csrc/cuda")]
import shim  # noqa: E402
from test_shim_intrinsics import places_of_a, places_of_b  # noqa: E402

pytestmark = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
WIDTHS = [4, 8, 16]
FACTOR = 0.7213475204444817  # of the logits, base 2, at D = 4
SEED, DROPOUT_P = 0x123456789ABCDEF, 0.3
# contraction index k of a tf32 product of weights and values -> key of the octet
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def run(what, per_lane, x, *, dtype="float32", channels=4, head=0, query=0, key=0):
    """(32, per_lane) words."""
    words = torch.zeros(32, per_lane, dtype=torch.int32)
    shim.run(
        shim.build(Path(__file__).with_name("attention_maps_harness.cpp")),
        what=what, words=words, x=x, dtype=str(dtype).removeprefix("torch."), channels=channels,
        factor=FACTOR, head=head, query=query, key=key, seed=torch.tensor([SEED]),
        threshold=dropout_rule(DROPOUT_P)[0],
    )  # fmt: skip
    return words


def matrix(words, dtype, places, shape):
    """The matrix whose fragments the lanes' words are; every element must come, and come equal."""
    elements = words.contiguous().view(dtype).float()  # (32, per lane)
    found = torch.full(shape, torch.nan)
    for lane in range(32):
        for (i, j), value in zip(places(lane), elements[lane], strict=True):
            assert found[i, j].isnan() or found[i, j] == value
            found[i, j] = value
    assert not found.isnan().any()
    return found


def left(words, dtype, shape):
    """A of an m16n8kK product, K by the number of words."""
    return matrix(words, dtype, places_of_a(f"mma_{shape} {kind(dtype)}"), (16, size_k(shape)))


def right(words, dtype, shape):
    return matrix(words, dtype, places_of_b(f"mma_{shape} {kind(dtype)}"), (size_k(shape), 8))


def kind(dtype):
    return "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def size_k(shape):
    return int(shape.rpartition("x")[2])


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_keys_values_and_queries_of_16_bits(dtype, D):
    x, q = torch.randn(32, D).to(dtype), torch.randn(16, D).to(dtype)
    blocks = 2 if D == 16 else 1
    words = run("keys", 4 * D // 4 + 4 * blocks, x, dtype=dtype, channels=D)
    high, low = split_half(x.float() * torch.tensor(FACTOR), dtype)
    shape = "16x8x8" if D == 4 else "16x8x16"
    for m in range(4):
        octet = slice(8 * m, 8 * m + 8)
        mine = words[:, m * D // 4 : (m + 1) * D // 4]
        k = torch.cat([right(part, dtype, shape) for part in mine.split(1 if D == 4 else 2, 1)])
        assert torch.equal(k, torch.cat([high[octet].mT, low[octet].mT]))
    ones = torch.ones(32, 1)
    for n in range(blocks):
        mine = words[:, D + 4 * n : D + 4 * n + 4]
        columns = torch.cat([x.float(), *[ones] * 8], 1)[:, 8 * n : 8 * n + 8]
        for j in range(2):
            v = right(mine[:, 2 * j : 2 * j + 2], dtype, "16x8x16")
            assert torch.equal(v, columns[16 * j : 16 * j + 16])
    words = run("queries", 2 if D == 4 else 4, q, dtype=dtype, channels=D)
    a = left(words, dtype, shape)
    assert torch.equal(a, q.float() if D == 16 else torch.cat([q, q], 1).float())


@pytest.mark.parametrize("D", WIDTHS)
def test_keys_values_and_queries_of_fp32(D):
    x, q = torch.randn(32, D), torch.randn(16, D)
    dtype, shape, size = torch.float32, "16x8x4" if D == 4 else "16x8x8", min(D, 8)
    blocks, rests = 2 if D == 16 else 1, 2 if D == 4 else D // 4
    words = run("keys", 2 * D + 4 * rests + 16 * blocks, x, channels=D)
    k_words, r_words, v_words = words.split([2 * D, 4 * rests, 16 * blocks], 1)
    parts = split_single(x, torch.tensor(FACTOR))
    for m in range(4):
        mine = k_words[:, m * D // 2 : (m + 1) * D // 2]
        third = r_words[:, m * rests : (m + 1) * rests]
        of_octet = [part[8 * m : 8 * m + 8].mT for part in parts]
        for c in range(0, D, 8):
            here = mine[:, c // 2 : c // 2 + 2 * max(size // 4, 1)].chunk(2, 1)
            for got, part in zip(here, of_octet, strict=False):
                assert torch.equal(right(got, dtype, shape), part[c : c + size])
            rest = truncated(right(third[:, c // 4 : c // 4 + size // 4], dtype, shape))
            assert torch.equal(rest, of_octet[2][c : c + size])
        if D == 4:
            assert torch.equal(right(third[:, 1:], dtype, shape), of_octet[0])
    v_high, v_low, _ = split_single(torch.cat([x, *[torch.ones(32, 1)] * 8], 1), torch.tensor(1.0))
    for n in range(blocks):
        for m in range(4):
            keys = 8 * m + torch.tensor(ORDER)
            for got, part in zip(
                v_words[:, 16 * n + 4 * m : 16 * n + 4 * m + 4].chunk(2, 1), (v_high, v_low),
                strict=True,
            ):  # fmt: skip
                assert torch.equal(right(got, dtype, "16x8x8"), part[keys, 8 * n : 8 * n + 8])
    words = run("queries", D // 2 * 2 + (4 if D == 4 else D // 2), q, channels=D)
    for got, part in zip(
        words[:, : D // 2 * 3].chunk(3, 1), split_single(q, torch.tensor(1.0)), strict=True
    ):
        for c in range(0, D, 8):
            a = truncated(left(got[:, c // 2 : c // 2 + size // 2], dtype, shape))
            assert torch.equal(a, part[:, c : c + size])
    if D == 4:
        assert torch.equal(left(words[:, 6:], dtype, shape), split_single(q, torch.tensor(1.0))[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_what_dropout_leaves(dtype):
    p, head, query, key = torch.rand(16, 16), 5, 48, 128
    per_step = 8 if dtype == torch.float32 else 4
    words = run("weights", 5 * per_step, p, dtype=dtype, head=head, query=query, key=key)
    kept = reference.keep_mask(torch.tensor([SEED]), (1, head + 1, 64, 192), DROPOUT_P)[0, head]

    def of_step(i):
        mine = words[:, i * per_step : (i + 1) * per_step]
        if dtype != torch.float32:
            return left(mine, dtype, "16x8x16")
        octets = [left(part, dtype, "16x8x8") for part in mine.chunk(2, 1)]
        return torch.cat(octets, 1)[:, [ORDER.index(j % 8) + j // 8 * 8 for j in range(16)]]

    expected = p.to(dtype).float()
    if dtype == torch.float32:
        expected = truncated((p.view(torch.int32) + 0x1000).view(torch.float32))
    assert torch.equal(of_step(0), expected)
    for word in range(4):
        first = key + 16 * word
        assert torch.equal(of_step(1 + word).bool(), kept[query : query + 16, first : first + 16])


def test_panels_of_the_backward_kernel():
    x = torch.randn(2, 16, 8).bfloat16()
    words = run("panels", 20, x.view(torch.int32))
    plain, transposed, halves = words[:, :4], words[:, 4:8], words[:, 8:12]
    for i, (panel, half) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        rows = x[panel, 8 * half : 8 * half + 8].float()
        # as a right operand: columns are rows of the panel, or its channels
        assert torch.equal(right(plain[:, i : i + 1], torch.bfloat16, "16x8x8"), rows.mT)
        assert torch.equal(right(transposed[:, i : i + 1], torch.bfloat16, "16x8x8"), rows)
        at = 2 * half + panel
        assert torch.equal(right(halves[:, at : at + 1], torch.bfloat16, "16x8x8"), rows.mT)
    quads = words[:, 12:].contiguous().view(torch.float32)
    for lane in range(32):
        for i in range(2):
            first = 8.0 * i + lane % 4 * 2
            assert quads[lane, 4 * i : 4 * i + 4].tolist() == [first, first + 1] * 2


@pytest.mark.parametrize("tiles, keys", [(1, [0, 16, 32, 48, 80]), (2, [0, 32, 96]), (4, [0, 64])])
def test_dropout_bits_of_the_backward_kernel(tiles, keys):
    for head, query, key in ((h, q, k) for h in (0, 7) for q in (0, 96) for k in keys):
        words = run(
            "backward_bits", 8 * tiles, torch.zeros(1), channels=tiles, head=head, query=query,
            key=key,
        )  # fmt: skip
        kept = reference.keep_mask(torch.tensor([SEED]), (1, head + 1, 128, 128), DROPOUT_P)
        found = torch.zeros(32, 16 * tiles, dtype=torch.bool)  # queries of two tiles, keys
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for i, word in enumerate(words[lane].tolist()):
                tile, m, n, r = i // 4 // tiles, i // 4 % tiles, i % 4 // 2, i % 2
                assert word & 0xFFFF in (0, 0xFFFF)
                row, column = 16 * tile + 8 * n + 2 * t, 16 * m + 8 * r + g
                found[row, column] = bool(word & 1)
                found[row + 1, column] = bool(word >> 31 & 1)
        expected = kept[0, head, query : query + 32, key : key + 16 * tiles]
        assert torch.equal(found, expected)
