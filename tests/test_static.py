"""The counted performance of the GPU kernels: against the kept table, and the arithmetic itself."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import limits, static

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
sys.path.insert(0, str(Path(__file__).parents[1] / "csrc/cuda"))
import cuda_toolkit
import sass
import shim


@pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))
@pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
def test_no_cuda_kernel_got_worse():
    kept = static.kept()
    if kept["versions"]["nvcc"] != cuda_toolkit.version(cuda_toolkit.find()):
        pytest.skip(f"the table was made with nvcc {kept['versions']['nvcc']}")
    rows = static.cuda_rows()
    remedy = "if that is meant: python -m benchmarks.static --write"
    assert static.worse(rows, kept["cuda"]) == [], remedy
    assert len(rows) == len(kept["cuda"]), remedy
    for row in rows:
        assert row["warps"] >= 8, row
        if row["limit_us"] is not None:
            assert row["counted_us"] >= row["limit_us"], row


def test_the_page_is_that_of_the_kept_table():
    assert static.PAGE.read_text() == static.page(static.kept())


def test_what_got_worse_is_named():
    kept = [
        {"kernel": "f", "dtype": "bf16", "head_dim": 4, "dropout": True}
        | {"registers": 100, "spills": 0, "slots": 4.0},
        {"name": "g[fp32]", "n_regs": 64, "n_spills": 0},
    ]
    assert static.worse(kept, kept) == []
    now = [kept[0] | {"registers": 109, "spills": 8, "slots": 4.2}, kept[1] | {"n_regs": 80}]
    assert static.worse([*now, {"name": "h"}], kept) == [
        "f[bf16, D <= 4, dropout]: 109 registers, were 100",
        "f[bf16, D <= 4, dropout]: spills 8 bytes, were 0",
        "f[bf16, D <= 4, dropout]: 4.2 instructions, were 4.0",
        "g[fp32]: 80 registers, were 64",
        "h: not in the table",
    ]


@pytest.mark.parametrize(
    "name, key",
    [
        (
            "void attention::attention_forward<dev::Bf16, 4, false, 2>(attention::ForwardPlan)",
            (("attention_forward", "bf16", 4, False), 2),
        ),
        (
            "void attention_backward<attention::bwd::Single<(int)16, (bool)1> >(Plan)",
            (("attention_backward", "fp32", 16, True), 0),
        ),
        (
            "void conv_stem::conv_stem_forward<dev::Fp16, true>(conv_stem::ForwardPlan)",
            (("conv_stem_forward, codes", "fp16", 0, False), 0),
        ),
    ],
)
def test_kernels_are_told_from_their_names(name, key):
    assert static.identify(name) == key


@pytest.mark.parametrize(
    "registers, shared, threads, blocks",
    [(128, 0, 128, 4), (129, 0, 128, 3), (32, 81920, 128, 2), (16, 0, 1024, 2), (16, 0, 32, 32)],
)
def test_resident_blocks(registers, shared, threads, blocks):
    assert static.resident_blocks(registers, shared, threads) == blocks


def test_products_are_counted_by_shape():
    device = static.DEVICE
    half = static.product_clocks(Counter({"HMMA.16816.F32.BF16": 1, "MUFU.EX2": 9}))
    assert half == pytest.approx(16 * 8 * 16 * 2 / (1024 * device.mma_sync))
    assert static.product_clocks(Counter({"HMMA.1688.F32.TF32": 1})) == pytest.approx(half)


def test_limits_of_attention():
    device = limits.DEVICES["H200"]
    shape = (256, 64, 256, 4)
    forward = limits.attention(device, *shape)
    # 16 exponentials a clock on 132 multiprocessors
    exps = 256 * 64 * 256 * 256 / (16 * 132 * 1.98e9)
    assert forward.exponentials == pytest.approx(exps)
    # some of them by polynomial: between the issue of the rest and the exponentials alone
    assert forward.issue < forward.balanced == forward.seconds < forward.exponentials
    dropped = limits.attention(device, *shape, dropout=True)
    assert forward.seconds < dropped.seconds < dropped.exponentials
    wide = limits.attention(device, 256, 8, 256, 32, backward=True)
    assert wide.seconds == wide.memory
    assert limits.attention(limits.DEVICES["H100"], *shape).seconds > forward.seconds
