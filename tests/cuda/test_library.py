"""The machine code in lsmha_fast._C_cuda: for which GPUs, and what its kernels need."""

import re

import pytest
import sass

from lsmha_fast import _ext

reason = _ext.cuda_ext_missing() or (sass.tool("cuobjdump") is None and "no cuobjdump") or None
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def usage():
    from lsmha_fast import _C_cuda

    return sass.library_usage(_C_cuda.__file__)


def test_every_kernel_is_there_for_every_gpu(usage):
    from lsmha_fast import _C_cuda

    listed = re.findall(r"(\d+)\.(\d\w?)", _C_cuda.architectures)
    kernels = {}
    for arch, name, _, _ in usage:
        kernels.setdefault(arch, set()).add(name)
    assert set(kernels) == {f"sm_{major}{minor}" for major, minor in listed}
    assert len(set(map(frozenset, kernels.values()))) == 1


def test_no_kernel_uses_local_memory(usage):
    assert [kernel for kernel in usage if kernel[3] > 0] == []
