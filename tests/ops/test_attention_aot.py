"""Every kernel configuration of attention builds for sm_90, without spills, with K >= 16."""

import pytest
from aot import assert_clean, assert_no_worse_than_kept, compile_budgeted

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def configs():
    return compile_budgeted("tests.ops.attention_launches")


def test_no_spills_and_deep_dots(configs):
    for config in configs:
        assert_clean(config)


def test_every_kernel_is_built(configs):
    kernels = {config["name"].partition("[")[0] for config in configs}
    assert kernels == {"_attention_fwd", "_attention_bwd", "_attention_bwd_bias"}


def test_shared_memory_fits(configs):
    for config in configs:
        assert config["shared"] <= 227 * 1024, config


def test_nothing_got_worse(configs):
    assert_no_worse_than_kept(configs)
