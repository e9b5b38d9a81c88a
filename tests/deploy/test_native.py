"""A transformer block as one native call: the error rule, instruction sets, bits and threads."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lsmha_fast import create_model
from lsmha_fast._ext import ext_missing
from lsmha_fast.deploy.form import Encoder, InferenceCCT
from lsmha_fast.deploy.native import NativeEncoder, native_missing, nativise
from lsmha_fast.nn import EncoderBlock
from lsmha_fast.testing import assert_no_worse

pytestmark = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
DTYPES = [torch.float32, torch.bfloat16]
# channels, heads, channels of a head, hidden channels: of whole panels and not
SIZES = [(64, 16, 4, 128), (40, 5, 3, 56), (33, 1, 33, 70), (256, 4, 64, 512)]


def make_block(size=(64, 16, 4, 128), **options):
    dim, heads, head_dim, hidden = size
    block = EncoderBlock(dim, heads, head_dim=head_dim, mlp_hidden=hidden, **options).eval()
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return block


@torch.no_grad()
def check(block, x, dtype):
    """No more than twice as far from fp64 as the eager block is in the same dtype."""
    low, high = copy.deepcopy(block).to(dtype), copy.deepcopy(block).to(dtype).double()
    x = x.to(dtype)
    native = NativeEncoder(Encoder(low, dtype))
    assert_no_worse(native(x), low(x), high(x.double()))
    return native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_block_is_no_worse_than_eager(size, pre_norm, dtype):
    torch.manual_seed(0)
    block = make_block(size, pre_norm=pre_norm)
    check(block, torch.randn(3, 50, size[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_the_batch_or_the_threads(dtype):
    torch.manual_seed(0)
    native = NativeEncoder(Encoder(make_block(), dtype))
    x = torch.randn(9, 77, 64, dtype=dtype)
    threads = torch.get_num_threads()
    with torch.no_grad():
        whole = native(x)
        assert torch.equal(native(x), whole)
        assert torch.equal(native(x[4:5]), whole[4:5])
        assert native(x[:0]).shape == (0, 77, 64)
        try:
            torch.set_num_threads(3)
            assert torch.equal(native(x), whole)
        finally:
            torch.set_num_threads(threads)


def test_gelu_at_every_size_of_its_argument():
    """Through a block whose first linear map is the identity and whose second adds nothing else."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -60.0, 60.0])])
    block = make_block((32, 1, 32, 32), pre_norm=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.linear2.weight.copy_(torch.eye(32))
    out = []
    native = Encoder(block, torch.float32)
    with torch.no_grad():
        for part in F.pad(x, (0, -len(x) % 32)).split(32):
            native.fc1.bias = part.clone()  # the rest of the first map is zero
            out.append(NativeEncoder(native)(torch.zeros(1, 1, 32)).flatten())
    got = torch.cat(out)[: len(x)]
    assert_no_worse(got, F.gelu(x), F.gelu(x.double()))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    code = (
        "import torch\n"
        "from test_native import DTYPES, SIZES, check, make_block\n"
        "for size in SIZES[:3]:\n"
        "    for dtype in DTYPES:\n"
        "        torch.manual_seed(0)\n"
        "        check(make_block(size), torch.randn(2, 21, size[0]), dtype)\n"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parent)


def test_what_does_not_fit_is_refused():
    native = NativeEncoder(Encoder(make_block(), torch.float32))
    with pytest.raises(RuntimeError, match="contiguous float32 or bfloat16"):
        native(torch.randn(1, 5, 64).double())
    with pytest.raises(RuntimeError, match="qkv has the wrong shape"):
        native(torch.randn(1, 5, 96))
    with pytest.raises(RuntimeError, match="qkv has the wrong shape, dtype"):
        native(torch.randn(1, 5, 64).bfloat16())


@pytest.fixture
def cpu(monkeypatch):
    """A processor with AVX-512 and its bfloat16 products, to be changed."""

    def has(capability="AVX512", bf16=True, tiles=False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)

    has()
    return has


def test_blocks_that_would_not_gain_stay_as_they_are(cpu):
    wide, narrow = (Encoder(make_block(), dtype) for dtype in DTYPES)
    assert native_missing(wide) is None
    assert native_missing(narrow) is None
    assert "float64" in native_missing(Encoder(make_block(), torch.float64))
    assert "'sdpa'" in native_missing(Encoder(make_block(backend="sdpa"), torch.float32))
    cpu("AVX2")
    assert native_missing(wide) is None
    assert "no vectors" in native_missing(narrow)
    cpu(bf16=False)
    assert "no vectors" in native_missing(narrow)
    cpu(tiles=True)
    assert "tiles" in native_missing(narrow)
    cpu("DEFAULT")
    assert "AVX2" in native_missing(wide)


def test_a_hybrid_has_native_blocks_where_there_is_attention(cpu):
    model = create_model("cct_2_3x1_32", 10, dim=32, depth=3, num_heads=8, conv_blocks=1)
    form = InferenceCCT(model.eval(), torch.float32)
    nativise(form)
    assert [type(b).__name__ for b in form.blocks] == ["ConvLayers", *["NativeEncoder"] * 2]
