"""Every kernel configuration of the conv stem builds for sm_90, without spills, with K >= 16."""

import pytest
from aot import assert_clean, assert_no_worse_than_kept, compile_budgeted

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def configs():
    return compile_budgeted("tests.ops.conv_stem_launches")


def test_no_spills_and_deep_dots(configs):
    for config in configs:
        assert_clean(config)


def test_every_kernel_is_built(configs):
    kernels = {config["name"].partition("[")[0] for config in configs}
    assert kernels == {"_conv_stem_fwd", "_conv_stem_bwd_dy", "_conv_stem_bwd_dweight"}


def test_shared_memory_fits_a_multiprocessor(configs):
    assert max(config["shared"] for config in configs) <= 227 * 1024


def test_nothing_got_worse(configs):
    assert_no_worse_than_kept(configs)
