"""The reader of registers and instructions, on kernels whose numbers are known."""

from pathlib import Path

import pytest
import sass

pytestmark = pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))


@pytest.fixture(scope="module", params=sass.ARCHITECTURES)
def kernels(request):
    found = sass.compile_kernels(Path(__file__).with_name("budget_kernels.cu"), request.param)
    return {name.partition("(")[0]: kernel for name, kernel in found.items()}


def test_a_loop_is_counted_per_score(kernels):
    kernel = kernels["exponentials"]
    kernel.assert_clean(registers=64)
    scores = 4 * 16 * 8
    assert len(kernel.loops) == 1
    assert kernel.loop.count("HMMA.1688.F32.BF16") == 4
    assert kernel.loop.count("MUFU.EX2") == 16
    per_score = kernel.loop.per_score(scores)
    assert per_score["mufu"] == 1
    assert per_score["hmma"] == 0.25
    # an exponential and a sum for each of a lane's 16 scores, four products, four loads; beside
    # them few instructions for the loop
    least = (16 * 2 + 4 + 4) * 32 / scores
    assert least <= per_score["slots"] <= 1.5 * least


def test_local_memory_is_seen(kernels):
    kernel = kernels["local_array"]
    assert kernel.stack == 32 * 4
    assert kernel.local_accesses > 0
    assert kernel.spills == 0
    with pytest.raises(AssertionError, match="128 bytes of local memory"):
        kernel.assert_clean()


def test_spills_are_seen(kernels):
    kernel = kernels["spilling"]
    assert kernel.registers <= 64
    assert kernel.spills > 0
    with pytest.raises(AssertionError, match="spills"):
        kernel.assert_clean()


def test_registers_have_a_budget(kernels):
    with pytest.raises(AssertionError, match=r"exponentials.*: \d+ registers"):
        kernels["exponentials"].assert_clean(registers=8)


def test_what_does_not_compile_is_reported(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { no_such_thing(); }\n")
    with pytest.raises(RuntimeError, match=r"wrong.cu does not compile[^$]*no_such_thing"):
        sass.compile_kernels(source, "sm_90a")
