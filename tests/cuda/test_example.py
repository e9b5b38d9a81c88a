"""The smallest kernel under the shim, as a pattern for the others."""

from pathlib import Path

import pytest
import shim
import torch

pytestmark = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))


@pytest.fixture(scope="module")
def row_sums():
    return shim.build(Path(__file__).with_name("example_harness.cpp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 70), (4, 32)])
def test_row_sums(row_sums, rows, columns, dtype):
    x = torch.randn(rows, columns + 3).to(dtype)[:, 2:-1]
    sums = torch.full((rows,), torch.nan)
    shim.run(row_sums, x=x, sums=sums)
    torch.testing.assert_close(sums, x.float().sum(1))


def test_an_output_too_small_is_reported(row_sums):
    with pytest.raises(shim.KernelError, match="AddressSanitizer: heap-buffer-overflow"):
        shim.run(row_sums, x=torch.randn(4, 5), sums=torch.zeros(3))
