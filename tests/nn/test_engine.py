"""LSMultiHeadAttention under torch.compile, export, autocast, checkpointing and CUDA graphs."""

import contextlib
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lsmha_fast import LSMultiHeadAttention, create_model
from lsmha_fast.ops import attention_decompositions
from lsmha_fast.testing import assert_no_worse


def module(**options):
    torch.manual_seed(1)
    return LSMultiHeadAttention(24, 6, batch_first=True, **options)


CALLS = {
    "self": lambda m, x: m(x, x, x, need_weights=False)[0],
    "weights": lambda m, x: torch.cat(m(x, x, x), -1),
    "per head": lambda m, x: m(x, x, x, average_attn_weights=False)[1],
    "cross": lambda m, x: m(x, x[:, :3], x[:, :3], need_weights=False)[0],
    "padding": lambda m, x: m(x, x, x, key_padding_mask=x[..., 0] > 1, need_weights=False)[0],
    "causal": lambda m, x: m(
        x,
        x,
        x,
        attn_mask=torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool(),
        is_causal=True,
        need_weights=False,
    )[0],
}


def run(function, m, x):
    """Output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = function(m, x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *m.parameters()])]


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph_forward_and_backward(name, training):
    m, x = module().double().train(training), torch.randn(2, 5, 24).double()
    if name == "per head":  # its gradient is that of softmax weights alone
        m.in_proj_bias.requires_grad_(False)
    expected = run(CALLS[name], m, x) if name != "per head" else [CALLS[name](m, x)]
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    actual = run(compiled, m, x) if name != "per head" else [compiled(m, x)]
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, x), expected[0])


@pytest.mark.usefixtures("_fresh")
def test_inductor_in_training_with_dropout():
    """In mode "reduce-overhead", which is the default one on a CPU."""
    m, x = module(dropout=0.5), torch.randn(3, 8, 24)
    compiled = torch.compile(m, fullgraph=True, mode="reduce-overhead")
    first, second = (compiled(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    m.eval()
    torch.testing.assert_close(compiled(x, x, x), m(x, x, x))


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["self", "weights", "padding"])
def test_dynamic_batch_compiles_once(name, training):
    m = module().train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (3, 5, 8, 13):
        x = torch.randn(batch, 7, 24)
        torch.testing.assert_close(run(compiled, m, x), run(CALLS[name], m, x))
        compilations.append(counter.frame_count)
    # torch may start over once inside the first call, when it learns that a float is constant
    assert compilations[0] <= 2
    assert set(compilations[1:]) == {compilations[0]}


@pytest.mark.usefixtures("_fresh")
def test_encoder_layer_compiles_in_evaluation():
    layer = nn.TransformerEncoderLayer(24, 6, 32, batch_first=True)
    layer.self_attn = module()
    layer.eval()
    x = torch.randn(2, 5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_on_the_cpu(need_weights):
    ours = module()
    theirs = nn.MultiheadAttention(24, 6, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24)
    mask = torch.randn(5, 5)
    high = theirs.double()(*[x.double()] * 3, attn_mask=mask.double())
    theirs.float()
    results = []
    for m in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(m(x, x, x, attn_mask=mask, need_weights=need_weights))
    assert_no_worse(results[0][0], results[1][0], high[0])
    results[0][0].float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    if need_weights:
        assert_no_worse(*(r[1].bfloat16() for r in results), high[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["self", "weights"])
def test_checkpointing_repeats_the_dropout(name, use_reentrant):
    m, x = module(dropout=0.5), torch.randn(2, 5, 24)
    call = CALLS[name]
    results = []
    for wrap in (
        lambda m, x: call(m, x),
        lambda m, x: checkpoint(call, m, x, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(4)
        results.append(run_backward(wrap, m, x))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def run_backward(function, m, x):
    """As `run`, by `backward()`, which re-entrant checkpointing needs."""
    m.zero_grad()
    x = x.clone().requires_grad_()
    out = function(m, x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in m.parameters())]


class Call(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.attn, self.call = module().eval(), CALLS[name]

    def forward(self, x):
        return self.call(self.attn, x)


@pytest.mark.parametrize("name", CALLS)
def test_export_round_trip(name):
    model, x = Call(name), torch.randn(4, 5, 24)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    again = torch.export.load(saved).module()
    for size in (4, 7):
        x = torch.randn(size, 5, 24)
        torch.testing.assert_close(again(x), model(x))
    standard = program.run_decompositions(attention_decompositions())
    assert "lsmha_fast" not in str(standard.graph)
    torch.testing.assert_close(standard.module()(x), model(x))


def test_decompositions_keep_masked_rows_at_zero_and_refuse_dropout():
    m = module().eval()
    x, padding = torch.randn(2, 5, 24), torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = m

        def forward(self, x, padding):
            return self.attn(x, x, x, key_padding_mask=padding)

    program = torch.export.export(Padded(), (x, padding))
    standard = program.run_decompositions(attention_decompositions()).module()
    torch.testing.assert_close(standard(x, padding), Padded()(x, padding))
    m.dropout = 0.1
    m.train()
    with pytest.raises(Exception, match="export after model.eval"):
        torch.export.export(Padded(), (x, padding)).run_decompositions(attention_decompositions())


AOT_CHECK = """
import sys, torch
if sys.argv[3] == "native":
    import lsmha_fast.ops
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), expected)
assert any(name.startswith("lsmha_fast") for name in sys.modules) == (sys.argv[3] == "native")
"""


@pytest.mark.parametrize("form", ["standard", "native"])
def test_aot_inductor_package_in_a_process_of_its_own(form, tmp_path):
    """In standard operators it runs without this package; as it is, with its native kernels."""
    model = Call("weights")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 5, 24),), dynamic_shapes=({0: batch},))
    if form == "standard":
        program = program.run_decompositions(attention_decompositions())
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    with torch.no_grad():
        cases = [(x, model(x)) for x in (torch.randn(n, 5, 24) for n in (4, 7))]
    torch.save(cases, tmp_path / "cases.pt")
    arguments = [package, str(tmp_path / "cases.pt"), form]
    subprocess.run([sys.executable, "-c", AOT_CHECK, *arguments], check=True)


def test_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = create_model("cct_2_3x2_32", 5, num_heads=16).eval()
    # the conv stem is an op of its own; the attention is what is exported here
    block, x = model.blocks[0], torch.randn(3, 64, model.blocks[0].norm1.normalized_shape[0])
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    program = program.run_decompositions(attention_decompositions())
    onnx = torch.onnx.export(program, verbose=False)
    session = runtime.InferenceSession(
        onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (i.name for i in session.get_inputs())
    for size in (3, 6):
        x = torch.randn(size, *x.shape[1:])
        (actual,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(actual), block(x), rtol=1e-4, atol=1e-5)


def test_heads_of_a_sample_do_not_depend_on_its_batch():
    """The op's part, given one projection; PyTorch's own matrix products choose by shape."""
    from lsmha_fast.ops import attention_packed, attention_weights

    qkv = torch.randn(7, 33, 3, 6, 4)
    q, k, _ = (t.transpose(1, 2) for t in qkv.unbind(2))
    whole, weights = attention_packed(qkv), attention_weights(q, k)
    for i in range(7):
        one = slice(i, i + 1)
        assert torch.equal(attention_packed(qkv[one]), whole[one])
        assert torch.equal(attention_weights(q[one], k[one]), weights[one])


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_bits_every_time():
    m, x = module(dropout=0.1), torch.randn(4, 33, 24)
    with deterministic():
        results = []
        for _ in range(3):
            torch.manual_seed(0)
            results.append(run(CALLS["weights"], m, x))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_reduce_overhead(dropout):
    m = module(dropout=dropout).cuda().bfloat16()
    compiled = torch.compile(CALLS["self"], fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(8, 64, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = compiled(m, x)
        out.float().square().mean().backward()
        assert torch.isfinite(x.grad).all()
    if dropout == 0:
        torch.testing.assert_close(compiled(m.eval(), x), CALLS["self"](m, x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["self", "weights", "padding"])
def test_cuda_graph_replays_with_new_inputs(name):
    m = module().cuda().bfloat16().eval().requires_grad_(False)
    x = torch.randn(8, 64, 24, device="cuda", dtype=torch.bfloat16)
    CALLS[name](m, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = CALLS[name](m, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, CALLS[name](m, x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler_on_cuda(dtype):
    m = module().cuda()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    x = torch.randn(4, 64, 24, device="cuda")
    before = m.in_proj_weight.detach().clone()
    with torch.autocast("cuda", dtype):
        out = m(x, x, x, need_weights=False)[0]
        assert out.dtype == dtype
        loss = out.float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(m.in_proj_weight, before)
    assert torch.isfinite(m.in_proj_weight).all()
