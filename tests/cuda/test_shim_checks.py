"""The shim reports what would go wrong on a GPU, and lets correct kernels pass."""

import re
from pathlib import Path

import pytest
import shim
import torch

pytestmark = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
SOURCE = Path(__file__).with_name("misuse_harness.cpp")
RIGHT = ["exchange_in_block", "exchange_in_warp", "halves_of_a_word", "warps_leave_apart"]
WRONG = {
    "read_of_another_warp": "thread 32: race: .*offset 0, written by thread 0 .* is read here",
    "read_of_another_lane": "thread 1: race: .*offset 0, written by thread 0 .* is read here",
    "shuffle_is_no_barrier": "thread 1: race: .*offset 0, written by thread 0 .* is read here",
    "write_after_read": "thread 1: race: .*offset 4, read by thread 0 .* is written here",
    "write_after_reads_by_many": "thread 40: race: .* read by several threads .* is written here",
    "two_writes": "thread 1: race: .*offset 0, written by thread 0 .* is written here",
    "matrix_without_barrier": "race: .* written by thread 0 .* is read here",
    "index_beyond_view": "thread 63: elements 63 to 63 of a Shared of 63",
    "negative_index": "thread 0: elements 4294967295 to .* of a Shared of 64",
    "view_beyond_memory": "Shared: 4096 bytes at offset 4 lie outside the 4096 bytes",
    "vector_beyond_view": "thread 15: elements 60 to 63 of a Shared of 62",
    "misaligned_vector": "store_shared: offset 8 in shared memory is not a multiple of 16",
    "misaligned_matrix": "ldmatrix: offset 8 in shared memory is not a multiple of 16",
    "matrix_beyond_memory": "ldmatrix: 16 bytes at offset 4088 lie outside the 4096 bytes",
    "unwritten_read": "thread 5: read of unwritten shared memory, offset 20",
    "unwritten_half": "thread 0: read of unwritten shared memory, offset 2",
    "unwritten_matrix": "read of unwritten shared memory, offset 144",
    "memory_of_the_block_before": r"block \(1,0,0\) thread 0: read of unwritten shared memory",
    "global_read": "AddressSanitizer: heap-buffer-overflow",
    "global_write": "AddressSanitizer: heap-buffer-overflow",
    "misaligned_global": "misaligned address",
    "signed_overflow": "signed integer overflow",
    "wide_shift": "shift exponent 32 is too large",
    "half_a_warp": r"thread 16: divergence: it has returned, while thread 0 waits at shfl_xor",
    "early_return": "thread 63: divergence: it has returned, while thread 32 waits at shfl_xor",
    "two_collectives": r"thread 7: divergence: it waits at shfl .* thread 0 waits at shfl_xor",
    "barrier_of_one_warp": "thread 32: divergence: .* while thread 0 waits at block_barrier",
    "two_barriers": "thread 32: divergence: it waits at block_barrier",
    "lanes_leave_the_loop": "thread 0: divergence: it has returned, while thread 31 waits",
    "copy_not_awaited": "into which a cp_async .* is under way",
    "copy_not_committed": "into which a cp_async .* is under way",
    "copy_without_barrier": "thread 1: race: .*offset 0, written by thread 0 .* is read here",
    "copy_over_what_is_read": "thread 1: race: .*offset 4, read by thread 0 .* is written here",
    "copy_left_behind": "it returns while a cp_async .* is under way",
    "copy_of_a_misaligned_address": "the global address .* is not a multiple of 16",
    "copy_beyond_the_tensor": "AddressSanitizer: heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def binary():
    return shim.build(SOURCE)


def run(binary, kernel, threads=64):
    x, y = torch.randn(64), torch.full((64,), torch.nan)
    shim.run(binary, kernel=kernel, blocks=2, threads=threads, x=x, y=y)
    return x, y


@pytest.mark.parametrize("kernel", RIGHT)
def test_correct_kernels_pass(binary, kernel):
    x, y = run(binary, kernel)
    expected = {
        "exchange_in_block": x.flip(0),
        "exchange_in_warp": x[torch.arange(64) ^ 7],
        "halves_of_a_word": torch.arange(64.0),
        "warps_leave_apart": torch.cat([y[:32], x[torch.arange(32, 64) ^ 1]]),
    }[kernel]
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", WRONG)
def test_a_mistake_is_reported(binary, kernel):
    with pytest.raises(shim.KernelError, match=WRONG[kernel]) as caught:
        run(binary, kernel)
    # the sanitizers give a stack, the shim the place in the kernel
    assert re.search(rf"{SOURCE.name}:\d+", str(caught.value))


def test_every_mistake_is_tried():
    kernels = set(re.findall(r"KERNEL\((\w+)\)", SOURCE.read_text())) - {"name"}
    assert kernels == {*RIGHT, *WRONG}


@pytest.mark.parametrize("threads", [0, 33, 1056])
def test_block_sizes_are_checked(binary, threads):
    with pytest.raises(shim.KernelError, match=f"a block of {threads} threads is not 32 to 1024"):
        run(binary, "exchange_in_block", threads=threads)


def test_a_reported_place_is_the_line_of_the_access(binary):
    lines = SOURCE.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "void two_writes" in line)
    place = f"{SOURCE.name}:{first + 3})"
    with pytest.raises(shim.KernelError, match=re.escape(place)):
        run(binary, "two_writes")


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("__syncthreads();", "__syncthreads"),
        ("__shared__ float s[32];", "__shared__"),
        ("dev::Shared<float> s(0, 32); *s.ptr(0) = 1.f;", "no match for|illegal|invalid"),
        ("dev::no_such_intrinsic(1);", "no_such_intrinsic"),
    ],
)
def test_what_the_shim_lacks_does_not_compile(tmp_path, body, complaint):
    source = tmp_path / "harness.cpp"
    text = f'#include "harness.h"\n__global__ void f() {{ {body} }}\nint main() {{ f(); }}\n'
    source.write_text(text)
    with pytest.raises(shim.KernelError, match=f"does not compile[^$]*({complaint})"):
        shim.build(source)


def test_the_portable_fibres_work_too():
    binary = shim.build(SOURCE, "-DSHIM_UCONTEXT")
    x, y = run(binary, "exchange_in_block")
    assert torch.equal(y, x.flip(0))
    with pytest.raises(shim.KernelError, match=WRONG["early_return"]):
        run(binary, "early_return")
