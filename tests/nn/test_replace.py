"""replace_attention: same numbers before and after, nothing half done, nothing lost."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lsmha_fast import CCT, LSMultiHeadAttention, replace_attention
from lsmha_fast.nn.replace import adapter
from lsmha_fast.testing import assert_no_worse


def randomised(model):
    """Biases and gains that start at zero would hide mistakes in what they multiply."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim < 2 or p.detach().abs().max() == 0:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def step(model, x):
    """Output and all gradients, in one vector, of a training step."""
    model.train()
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    # fused projections of the same parameters: one vector, as some gradients are zero but for noise
    return out.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


def check_same(model, x, swaps=None):
    """Swap a copy, compare outputs in evaluation and gradients in training with fp64."""
    model = randomised(model)
    low, high, swapped = model, copy.deepcopy(model).double(), copy.deepcopy(model)
    account = replace_attention(swapped)
    assert swaps is None or len(account) == swaps, str(account)
    assert list(swapped.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert_no_worse(swapped(x), low(x), high(x.double()))
    results = [step(m, x.to(p.dtype)) for m in (swapped, low, high) for p in [next(m.parameters())]]
    for factor, (actual, plain, exact) in zip((2, 3), zip(*results, strict=True), strict=True):
        assert_no_worse(actual, plain, exact, factor)
    return account


TIMM = {
    "vit_tiny_patch16_224": (dict(img_size=32, depth=2), 2),
    "deit3_small_patch16_224": (dict(img_size=32, depth=2), 2),
    "vit_small_patch16_224": (dict(img_size=32, depth=2, qk_norm=True, init_values=0.1), 2),
    "pit_ti_224": (dict(img_size=64, base_dims=(16, 16, 16), depth=(1, 1, 1)), 3),
    "levit_128s": (dict(img_size=128, depth=(1, 1, 1)), 5),
    "levit_conv_128s": (dict(img_size=128, depth=(1, 1, 1)), 5),
    "efficientvit_m0": (dict(img_size=128), 6),
    "swin_tiny_patch4_window7_224": (
        dict(img_size=56, window_size=7, embed_dim=24, depths=(2, 2), num_heads=(3, 6))
        | dict(drop_path_rate=0.0),
        4,
    ),
    "swinv2_tiny_window8_256": (
        dict(img_size=64, window_size=8, embed_dim=24, depths=(2, 2), num_heads=(3, 6))
        | dict(drop_path_rate=0.0),
        4,
    ),
    "beit_base_patch16_224": (dict(img_size=48, embed_dim=48, depth=2, num_heads=6), 2),
    "beitv2_base_patch16_224": (
        dict(img_size=48, embed_dim=48, depth=2, num_heads=6, use_shared_rel_pos_bias=True)
        | dict(use_rel_pos_bias=False),
        2,
    ),
    "vit_relpos_small_patch16_224": (dict(img_size=48, embed_dim=48, depth=2, num_heads=6), 2),
    "vit_relpos_base_patch32_plus_rpn_256": (
        dict(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=6),
        2,
    ),
    "eva02_tiny_patch14_224": (dict(img_size=56, embed_dim=48, depth=2, num_heads=3), 2),
    "tiny_vit_5m_224": (dict(depths=(1, 1, 1, 1), drop_path_rate=0.0), 3),
    "cait_xxs24_224": (dict(img_size=32, depth=1, depth_token_only=2), 2),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name, fused):
    timm = pytest.importorskip("timm")
    options, swaps = TIMM[name]
    model = timm.create_model(name, num_classes=5, **options)
    modes = [m for m in model.modules() if hasattr(m, "fused_attn")]
    if not modes and not fused:
        pytest.skip("the model has one way to compute attention")
    for m in modes:
        m.fused_attn = fused
    size = options.get("img_size", 224)
    account = check_same(model, torch.randn(3, 3, size, size), swaps)
    expected = {"cait_xxs24_224": "mixes the heads"}.get(name)
    assert [s for s in account.skipped if expected is None or expected not in s.reason] == []


def test_timm_dropout_masks_and_switches():
    timm = pytest.importorskip("timm")
    from timm.layers import Attention

    module = randomised(
        Attention(32, 4, qk_norm=True, norm_layer=nn.LayerNorm, attn_drop=0.5, proj_drop=0.5)
    )
    before, x = copy.deepcopy(module), torch.randn(2, 6, 32)
    replace_attention(module)
    assert isinstance(module, Attention)
    for mask in (torch.rand(6, 6) > 0.3, torch.randn(2, 1, 6, 6)):
        torch.testing.assert_close(module(x, attn_mask=mask), before(x, attn_mask=mask))
    torch.testing.assert_close(module(x, is_causal=True), before(x, is_causal=True))
    module.train()
    module.proj_drop.p = 0.0
    assert not torch.equal(module(x), module(x))
    module.attn_drop.p = 0.0
    torch.testing.assert_close(module(x), before(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(3,), depths=(2,)
    )
    replace_attention(swin)
    swin.set_input_size(
        (96, 96), window_size=6
    )  # the methods of the original class are still there
    assert swin.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 1000)


def test_torchvision_vit():
    vision = pytest.importorskip("torchvision").models.vision_transformer
    model = vision.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5)
    account = check_same(model, torch.randn(2, 3, 32, 32), 2)
    assert account[0].origin.endswith("MultiheadAttention")
    assert account[0][2:] == (3, 16)


@pytest.mark.parametrize("name", ["vit.ViT", "simple_vit.SimpleViT", "cct.CCT"])
def test_vit_pytorch(name):
    package = pytest.importorskip("vit_pytorch")
    path, cls = name.split(".")
    make = getattr(__import__(f"{package.__name__}.{path}", fromlist=[cls]), cls)
    if cls == "CCT":
        model = make(
            img_size=32, embedding_dim=48, num_layers=2, num_heads=6, num_classes=5,
            stochastic_depth_rate=0.0, dropout_rate=0.0, attention_dropout=0.0,
        )  # fmt: skip
    else:
        model = make(
            image_size=32, patch_size=8, num_classes=5, dim=48, depth=2, heads=3, dim_head=8,
            mlp_dim=64,
        )  # fmt: skip
    check_same(model, torch.randn(2, 3, 32, 32), 2)


class Attention(nn.Module):
    """As in the published CCT code: attributes `num_heads`, `scale`, `qkv`, `proj`."""

    def __init__(self, dim=24, num_heads=6, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def scores(self, q, k):
        return q @ k.mT * self.scale

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop(self.scores(q, k).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))


def test_published_cct_attention():
    model = nn.Sequential(nn.Linear(7, 24), Attention(), nn.Tanh(), Attention(num_heads=24))
    account = check_same(model, torch.randn(2, 9, 7), 2)
    assert [s.name for s in account] == ["1", "3"]
    assert [s[2:] for s in account] == [(6, 4), (24, 1)]


class Sharper(Attention):
    """Looks the same and computes something else."""

    def scores(self, q, k):
        return super().scores(q, k) * 2


Sharper.__name__ = "Attention"


class MoreParts(Attention):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(6))


MoreParts.__name__ = "Attention"


class Masked(Attention):
    def forward(self, x, padding=None):
        return super().forward(x)


Masked.__name__ = "Attention"


class Broken(Attention):
    def forward(self, x):
        raise OSError("no disk")


Broken.__name__ = "Attention"


class LinearAttention(nn.Linear):
    pass


class OwnMultihead(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "make, reason",
    [
        (Sharper, "output differs"),
        (MoreParts, "its gamma"),
        (Masked, "the padding of its forward"),
        (Broken, "no disk"),
        (lambda: LinearAttention(4, 4), "no adapter knows this class"),
        (lambda: OwnMultihead(8, 2), "subclass"),
        (lambda: Attention().to("meta"), "meta device"),
    ],
)
def test_what_cannot_be_swapped_is_named_and_untouched(make, reason):
    model = nn.ModuleDict({"inner": make()})
    state, cls = dict(model["inner"].__dict__), type(model["inner"])
    random_state = torch.get_rng_state()
    account = replace_attention(model)
    assert account == []
    assert [(s.name, reason in s.reason) for s in account.skipped] == [("inner", True)]
    assert type(model["inner"]) is cls
    assert model["inner"].__dict__.keys() == state.keys()
    assert model["inner"].training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_account_is_printed_only_when_asked(capsys):
    model = nn.Sequential(nn.MultiheadAttention(8, 2), LinearAttention(4, 4))
    account = replace_attention(model)
    assert capsys.readouterr().out == ""
    assert str(account).splitlines()[0] == "1 attention modules swapped, 1 left as they are"
    assert replace_attention(model) == []  # nothing to do a second time
    replace_attention(nn.Sequential(nn.MultiheadAttention(8, 2)), verbose=True)
    assert "0: torch.nn.modules.activation.MultiheadAttention, 2 x 4" in capsys.readouterr().out


def test_optimizers_hooks_copies_and_sharing_survive():
    shared = Attention()
    model = nn.ModuleList([shared, shared, nn.MultiheadAttention(24, 4, batch_first=True)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    handle = shared.register_forward_hook(lambda *_: calls.append(1))
    assert len(replace_attention(model, backend="reference")) == 2
    assert model[0] is model[1]
    assert model[0].backend == model[2].backend == "reference"
    x = torch.randn(2, 5, 24)
    before = model[0](x)
    assert calls == [1]
    handle.remove()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone[0](x), before)
        assert isinstance(clone[0], adapter.Adapter)
        assert isinstance(clone[2], LSMultiHeadAttention)
    (model[1](x).square().sum() + model[2](x, x, x)[0].square().sum()).backward()
    optimizer.step()
    assert not torch.equal(model[0](x), before)


def test_an_attention_module_itself_and_our_own_models():
    x = torch.randn(2, 5, 24)
    for module in (nn.MultiheadAttention(24, 3, add_bias_kv=True), Attention()):
        before = copy.deepcopy(module)
        args = (x, x, x) if isinstance(before, nn.MultiheadAttention) else (x,)
        (swap,) = replace_attention(module)
        assert swap.name == ""
        torch.testing.assert_close(module(*args), before(*args))
    ours = CCT(num_classes=3, dim=16, depth=1, num_heads=4)
    assert replace_attention(ours) == []


def test_swapped_models_compile_in_one_graph():
    model = nn.Sequential(Attention(), Attention())
    x = torch.randn(2, 5, 24)
    expected = model(x)
    replace_attention(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
