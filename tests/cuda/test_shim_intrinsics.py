"""Host bodies of the intrinsics against the tables of the PTX manual, and against a GPU."""

import ctypes
import itertools
import subprocess
from pathlib import Path

import cuda_toolkit
import pytest
import sass
import shim
import torch

HERE = Path(__file__).parent
OPS = [
    *("mma_16x8x8 bfloat16", "mma_16x8x8 float16", "mma_16x8x16 bfloat16", "mma_16x8x16 float16"),
    *("mma_16x8x4 tf32", "mma_16x8x8 tf32", "ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2"),
    *("ldmatrix_x2_trans", "shuffle", "convert bfloat16", "convert float16", "compute", "copy"),
]
MMA, LOADS = OPS[:6], OPS[6:10]
LANES = range(32)
needs_compiler = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
needs_nvcc = pytest.mark.skipif(
    cuda_toolkit.missing() is not None, reason=str(cuda_toolkit.missing())
)
EDGES = [
    *(0.0, -0.0, 1.0, -1.0, 65504.0, 65519.9, 65520.0, 1e5, -7e4, 3.4028235e38, 2.0**-14),
    *(2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26, 1.5 * 2.0**-24, 2.5 * 2.0**-24, 1e-40),
    *(1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23),
    *(float("inf"), float("-inf"), float("nan"), 2.0**-126, -126.5, 127.99, -127.0, 128.0, -150.0),
]


@pytest.fixture(scope="module")
def host():
    """Runs an intrinsic for 12 words per lane (blocks, 32, 12); gives (blocks, 32, 8) words."""
    binary = shim.build(HERE / "intrinsics_harness.cpp")

    def run(op, words):
        results = torch.zeros(*words.shape[:2], 8, dtype=torch.int32)
        shim.run(binary, op=OPS.index(op), words=words, results=results)
        return results

    return run


def bits(x):
    return x.contiguous().view(torch.int32)


def floats(x):
    return x.contiguous().view(torch.float32)


def places_of_a(kind):
    """(row, k) of every element of a lane's fragment of A, in order, as the manual lists them."""
    shape, dtype = kind.split()
    rows = {"mma_16x8x8": [0, 0, 8, 8], "mma_16x8x16": [0, 0, 8, 8, 0, 0, 8, 8]}
    ks = {"mma_16x8x8": [0, 1, 0, 1], "mma_16x8x16": [0, 1, 0, 1, 8, 9, 8, 9]}
    if dtype == "tf32":
        rows = {"mma_16x8x4": [0, 8], "mma_16x8x8": [0, 8, 0, 8]}
        ks = {"mma_16x8x4": [0, 0], "mma_16x8x8": [0, 0, 4, 4]}
    step = 1 if dtype == "tf32" else 2
    return lambda lane: [
        (lane // 4 + r, lane % 4 * step + k) for r, k in zip(rows[shape], ks[shape], strict=True)
    ]


def places_of_b(kind):
    """(k, column) of every element of a lane's fragment of B."""
    shape, dtype = kind.split()
    if dtype == "tf32":
        ks = {"mma_16x8x4": [0], "mma_16x8x8": [0, 4]}[shape]
        return lambda lane: [(lane % 4 + k, lane // 4) for k in ks]
    ks = {"mma_16x8x8": [0, 1], "mma_16x8x16": [0, 1, 8, 9]}[shape]
    return lambda lane: [(lane % 4 * 2 + k, lane // 4) for k in ks]


def place_of_c(lane, i):
    return lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2


def fragments(kind, a, b, c):
    """Words of all lanes for a (blocks, 16, K), b (blocks, K, 8), c (blocks, 16, 8), fp32."""
    dtype = kind.split()[1]
    words = torch.zeros(a.shape[0], 32, 12, dtype=torch.int32)
    for lane in LANES:
        for first, matrix, places in ((0, a, places_of_a(kind)), (4, b, places_of_b(kind))):
            values = torch.stack([matrix[:, i, j] for i, j in places(lane)], 1)
            if dtype != "tf32":
                values = values.to(getattr(torch, dtype))
            packed = bits(values)
            words[:, lane, first : first + packed.shape[1]] = packed
        values = torch.stack([c[(slice(None), *place_of_c(lane, i))] for i in range(4)], 1)
        words[:, lane, 8:] = bits(values)
    return words


def gather(results):
    """The 16 x 8 products of all blocks."""
    d = torch.zeros(results.shape[0], 16, 8)
    for lane, i in itertools.product(LANES, range(4)):
        d[(slice(None), *place_of_c(lane, i))] = floats(results[:, lane, i])
    return d


def matrices(kind, blocks=3):
    k = int(kind.split()[0].split("x")[-1])
    # small integers: exact in every format and order
    a, b = (torch.randint(-8, 9, s).float() for s in ((blocks, 16, k), (blocks, k, 8)))
    return a, b, torch.randint(-99, 99, (blocks, 16, 8)).float()


@needs_compiler
@pytest.mark.parametrize("kind", MMA)
def test_products(host, kind):
    a, b, c = matrices(kind)
    assert torch.equal(gather(host(kind, fragments(kind, a, b, c))), a @ b + c)


@needs_compiler
@pytest.mark.parametrize("kind", MMA)
def test_products_are_summed_in_fp32_in_the_order_of_k(host, kind):
    a, b, c = matrices(kind)
    a, b, c = (torch.randn_like(x) for x in (a, b, c))
    dtype = kind.split()[1]
    if dtype == "tf32":  # the low bits do not count
        low_a, low_b = (floats(bits(x) & ~0x1FFF) for x in (a, b))
        assert not torch.equal(low_a, a)
    else:
        low_a, low_b = (x.to(getattr(torch, dtype)).float() for x in (a, b))
    d = c
    for k in range(a.shape[2]):
        d = d + low_a[:, :, k, None] * low_b[:, k, None]
    assert torch.equal(gather(host(kind, fragments(kind, a, b, c))), d)


def rows_of_matrices():
    """Words (1, 32, 12) whose first four are a row of 8 16-bit numbers, all different."""
    words = torch.zeros(1, 32, 12, dtype=torch.int32)
    numbers = torch.arange(256, dtype=torch.int16).reshape(32, 8) * 3 + 1
    words[0, :, :4] = numbers.view(torch.int32)
    return words, numbers.reshape(4, 8, 8)


@needs_compiler
@pytest.mark.parametrize("op", LOADS)
def test_matrix_loads(host, op):
    words, loaded = rows_of_matrices()
    count = 2 if "x2" in op else 4
    results = host(op, words)[0]
    for lane, j in itertools.product(LANES, range(count)):
        matrix = loaded[j].T if "trans" in op else loaded[j]
        pair = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
        assert results[lane, j] == pair.contiguous().view(torch.int32), (lane, j)


@needs_compiler
def test_shuffles_and_the_transpose(host):
    words = torch.randint(-(2**31), 2**31, (2, 32, 12), dtype=torch.int32)
    words[..., 1] = bits(torch.randn(2, 32))
    results = host("shuffle", words)
    lanes = torch.arange(32)
    sources = [lanes ^ 1, lanes ^ 16, lanes * 0 + 3, lanes // 4 * 4]
    for i, source in enumerate(sources):
        assert torch.equal(results[..., i], words[:, source, 0])
    assert torch.equal(results[..., 4], words[:, lanes ^ 5, 1])
    assert torch.equal(results[..., 5], words[:, 31 - lanes, 1])
    # lane 4 g + t holds columns 2 t, 2 t + 1 of row g
    matrix = words[..., 2].contiguous().view(torch.int16).reshape(2, 8, 8)
    transposed = matrix.transpose(1, 2).contiguous().view(torch.int32).reshape(2, 32)
    assert torch.equal(results[..., 6], transposed)


def some_floats(blocks):
    x = torch.randn(blocks, 32, 12) * torch.exp2(torch.randint(-30, 18, (blocks, 32, 12)))
    x[0, :, 0] = torch.tensor(EDGES)
    x[0, :, 1] = torch.tensor(EDGES[::-1])
    words = bits(x)
    # any bits at all, for the conversions from 16 bits
    words[..., 2] = torch.randint(-(2**31), 2**31, words.shape[:2], dtype=torch.int32)
    return words


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(host, dtype):
    words = some_floats(64)
    results = host(f"convert {str(dtype).removeprefix('torch.')}", words)
    x = floats(words)
    low = x[..., :2].to(dtype).view(torch.int16)
    low[x[..., :2].isnan()] = 0x7FFF
    assert torch.equal(results[..., 0], low.contiguous().view(torch.int32)[..., 0])
    assert torch.equal(results[..., 1], low[..., 0].int() & 0xFFFF)
    wide = words[..., 2:3].contiguous().view(dtype).float()
    for i, expected in ((2, wide[..., 0]), (3, wide[..., 1]), (4, wide[..., 0])):
        same = bits(expected) == results[..., i]
        assert bool((same | expected.isnan() & floats(results[..., i]).isnan()).all())


@needs_compiler
def test_rounding_to_tf32(host):
    words = some_floats(64)
    x = floats(words[..., 0])
    rounded = floats(host("convert float16", words)[..., 5])
    # ten bits of fraction: the nearer neighbour, and of two equally near ones the larger
    down = floats(bits(x) & ~0x1FFF)
    up = floats((bits(x) & ~0x1FFF) + 0x2000)
    nearer = torch.where((x.double() - down).abs() < (up.double() - x).abs(), down, up)
    finite = x.isfinite() & up.isfinite()
    assert torch.equal(rounded[finite], nearer[finite])
    assert rounded[x.isnan()].isnan().all()


@needs_compiler
def test_arithmetic(host):
    words = some_floats(64)
    x, y, z = (floats(words[..., i]) for i in range(3))
    results = host("compute", words)

    def flush(t):
        return torch.where(t.abs() < 2.0**-126, torch.copysign(torch.zeros(()), t), t)

    flushed = flush(x.float()).double()
    for i, exact in enumerate([flushed.exp2(), flushed.log2(), 1 / flushed]):
        torch.testing.assert_close(
            floats(results[..., i]), flush(exact.float()), rtol=0, atol=0, equal_nan=True
        )
    exact = x.double() * y.double() + z.double()  # rounded twice: off by one place at most
    torch.testing.assert_close(
        floats(results[..., 3]), exact.float(), rtol=2**-23, atol=0, equal_nan=True
    )
    a, b = (words[..., i].numpy().view("uint32") for i in (0, 1))
    assert (results[..., 4].numpy().view("uint32") == (a.astype("uint64") * b >> 32)).all()
    both = torch.cat([bytes_of(words[..., 0]), bytes_of(words[..., 1])], -1)
    picks = torch.stack([words[..., 3] >> 4 * i & 7 for i in range(4)], -1)
    assert torch.equal(bytes_of(results[..., 5]), both.gather(-1, picks.long()))


def bytes_of(words):
    return words.contiguous().view(torch.uint8).reshape(*words.shape, 4)


@needs_compiler
def test_fused_multiply_add_rounds_once(host):
    words = torch.zeros(1, 32, 12)
    words[..., 0], words[..., 1], words[..., 2] = 1 + 2.0**-12, 1 - 2.0**-12, -1
    assert (floats(host("compute", bits(words))[..., 3]) == -(2.0**-24)).all()


@needs_compiler
def test_asynchronous_copies(host):
    words = torch.randint(-(2**31), 2**31, (2, 32, 12), dtype=torch.int32)
    expected = words[..., :7].clone()
    expected[:, 1::2] = 0
    assert torch.equal(host("copy", words)[..., :7], expected)


@pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_every_intrinsic_compiles_to_its_instruction(arch):
    [kernel] = sass.compile_kernels(HERE / "intrinsics.cu", arch).values()
    kernel.assert_clean()
    expected = INSTRUCTIONS + PACKS[arch]
    assert [name for name in expected if not kernel.instructions.get(name)] == []


INSTRUCTIONS = [
    *("HMMA.1688.F32.BF16", "HMMA.1688.F32", "HMMA.16816.F32.BF16", "HMMA.16816.F32"),
    *("HMMA.1684.F32.TF32", "HMMA.1688.F32.TF32", "MOVM.16.MT88", "LDSM.16.M88.4"),
    *("LDSM.16.MT88.4", "LDSM.16.M88.2", "LDSM.16.MT88.2", "SHFL.BFLY", "SHFL.IDX"),
    *("MUFU.EX2", "MUFU.LG2", "MUFU.RCP", "FFMA", "PRMT"),
    *("LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "LDGSTS.E"),
]
PACKS = {
    "sm_80": ["F2FP.BF16.PACK_AB", "F2FP.PACK_AB"],
    "sm_90a": ["F2FP.BF16.F32.PACK_AB", "F2FP.F16.F32.PACK_AB"],
}


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The same on a GPU."""
    library = tmp_path_factory.mktemp("intrinsics") / "intrinsics.so"
    major, minor = torch.cuda.get_device_capability()
    command = [
        str(cuda_toolkit.nvcc(cuda_toolkit.find())),
        "-std=c++17",
        f"-arch=sm_{major}{minor}",
        "-shared",
    ]
    command += [
        "-std=c++17",
        "-Xcompiler",
        "-fPIC",
        "-I",
        shim.KERNELS,
        "-o",
        library,
        HERE / "intrinsics.cu",
    ]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).run_intrinsics

    def run(op, words):
        words = words.cuda()
        results = torch.zeros(*words.shape[:2], 8, dtype=torch.int32, device="cuda")
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (words, results))
        torch.cuda.synchronize()
        assert function(OPS.index(op), *pointers, words.shape[0]) == 0
        return results.cpu()

    return run


def same_numbers(x, y):
    """Equal bits, or both not numbers."""
    x, y = floats(x), floats(y)
    return (bits(x) == bits(y)) | (x.isnan() & y.isnan())


@pytest.mark.gpu
@needs_compiler
@needs_nvcc
@pytest.mark.parametrize("op", [op for op in OPS if op not in MMA])
def test_the_gpu_gives_the_same_bits(host, device, op):
    words = rows_of_matrices()[0] if op in LOADS else some_floats(64)
    here, there = host(op, words), device(op, words)
    if op == "compute":  # approximate: two units in the last place
        for i in range(3):
            x, y = floats(here[..., i]), floats(there[..., i])
            torch.testing.assert_close(x, y, rtol=2**-22, atol=2**-22, equal_nan=True)
        here[..., :3] = there[..., :3]
    assert same_numbers(here, there).all()


@pytest.mark.gpu
@needs_compiler
@needs_nvcc
@pytest.mark.parametrize("kind", MMA)
def test_the_gpu_multiplies_as_exactly(host, device, kind):
    a, b, c = matrices(kind)
    words = fragments(kind, a, b, c)
    assert torch.equal(host(kind, words), device(kind, words))
    a, b, c = (torch.randn_like(x) for x in (a, b, c))
    words = fragments(kind, a, b, c)
    # sums of at most 17 terms of about one, each rounded or cut off in fp32
    torch.testing.assert_close(
        gather(host(kind, words)), gather(device(kind, words)), rtol=0, atol=2**-17
    )
