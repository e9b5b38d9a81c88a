"""augment and mix_and_erase: every byte against Pillow and timm, every backend bit for bit."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
import augment_oracle
from aot import assert_clean, compile_budgeted

from lsmha_fast._ext import ext_missing
from lsmha_fast.data import AugmentConfig
from lsmha_fast.data.device_batches import normal_levels
from lsmha_fast.data.draws import NAMES, draw_plan, layer_rows
from lsmha_fast.ops import augment, mix_and_erase

needs_cpp = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
NATIVE = [pytest.param("cpp", marks=needs_cpp), "triton"]
BACKENDS = ["reference", *NATIVE]
# (C, H, W): the real one, grey, not square, more than a tile, smaller than a filter
SIZES = [(3, 32, 32), (1, 32, 32), (3, 24, 40), (3, 2, 2)]
INTERPRETED = not torch.cuda.is_available()
FILL = [129, 124, 112]


def pictures(C, H, W):
    """Noise, a flat image, few levels, a ramp with noise: what the operations treat apart."""
    noise = torch.randint(0, 256, (2, C, H, W))
    ramp = (torch.arange(H * W).view(1, 1, H, W) * 200 // (H * W) + 20).expand(1, C, H, W)
    flat = torch.full((1, C, H, W), 77)
    images = torch.cat([noise, flat, noise[:1] % 3 * 60 + 40, ramp + noise[:1] % 30])
    return images.to(torch.uint8)


def whole(n, H, W):
    return torch.tensor([[0, 0, H, W, 0, 0]] * n, dtype=torch.int32)


def run(images, index, crops, layers, backend, device):
    device = "cpu" if backend == "cpp" else device
    tensors = [t.to(device) for t in (images, index, crops, layers)]
    return augment(*tensors, FILL[: images.shape[1]], backend=backend).cpu()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operations_give_pillows_bytes(backend, name, size, device):
    images = pictures(*size)
    if backend == "triton" and INTERPRETED:  # it takes its time: more than a tile, few images
        if size[0] == 1 or size[2] == 40:
            pytest.skip("too long in Triton's interpreter")
        size = (3, 24, 26) if size[1] == 32 else size
        images = pictures(*size)[3:]
    C, H, W = size
    cases = [(8.61, 1, 0), (9.37, -1, 1), (10.0, 1, 1), (7.9, -1, 0), (0.0, 1, 1)]
    magnitude, sign, kind = (np.repeat(np.array(v), len(images)) for v in zip(*cases, strict=True))
    chosen = np.full(len(magnitude), NAMES.index(name))
    layers = torch.from_numpy(layer_rows(chosen, magnitude, sign, kind, H, W))[:, None]
    index = torch.arange(len(images)).repeat(len(cases))
    out = run(images, index, whole(len(index), H, W), layers, backend, device)
    for i, b in enumerate(index.tolist()):
        case = (name, float(magnitude[i]), int(sign[i]), int(kind[i]))
        picture = augment_oracle.to_pil(images[b])
        expected = augment_oracle.operation(picture, *case, FILL[:C])
        assert torch.equal(out[i], augment_oracle.to_tensor(expected)), (case, b)


@pytest.mark.parametrize("size", [*SIZES, (3, 48, 64)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_give_pillows_bytes(backend, size, device):
    C, H, W = size
    images = pictures(*size)
    n = 3 if backend == "triton" and INTERPRETED else 60
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, H + 1, n), rng.integers(1, W + 1, n)
    top, left = rng.integers(0, H - height + 1), rng.integers(0, W - width + 1)
    columns = (top, left, height, width, rng.integers(0, 2, n), rng.integers(0, 2, n))
    crops = torch.from_numpy(np.stack(columns, 1)).int()
    index = torch.from_numpy(rng.integers(0, len(images), n))
    out = run(images, index, crops, torch.zeros(n, 0, 8).double(), backend, device)
    for i, row in enumerate(crops.tolist()):
        expected = augment_oracle.crop(augment_oracle.to_pil(images[index[i]]), row)
        assert torch.equal(out[i], augment_oracle.to_tensor(expected)), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_recipe_gives_pillows_bytes(backend, device):
    """Crop, flip and two drawn operations one after another, as timm runs them."""
    images = pictures(3, 32, 32)
    n = 4 if backend == "triton" and INTERPRETED else 200
    plan = draw_plan(
        AugmentConfig(auto_augment="rand-m9-mstd0.5-p1-inc1"), 3, 1, torch.arange(n), 32, 32
    )
    index = torch.arange(n) % len(images)
    out = run(images, index, plan.crops, plan.layers, backend, device)
    for i in range(n):
        picture = augment_oracle.crop(
            augment_oracle.to_pil(images[index[i]]), plan.crops[i].tolist()
        )
        for layer in plan.layers[i].tolist():
            picture = augment_oracle.layer(picture, layer, FILL)
        assert torch.equal(out[i], augment_oracle.to_tensor(picture)), i


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_depends_on_its_own_row_alone(backend, device):
    images = pictures(3, 32, 32)
    plan = draw_plan(AugmentConfig(), 0, 0, torch.arange(5), 32, 32)
    index = torch.arange(5)
    together = run(images, index, plan.crops, plan.layers, backend, device)
    order = torch.tensor([3, 0, 4])
    some = run(images, order, plan.crops[order], plan.layers[order], backend, device)
    assert torch.equal(some, together[order])


MIXES = {"none": (1.0, []), "mixup": (0.37, []), "cutmix": (0.8, [3, 17, 0, 9])}


def mix_inputs(B, C, H, W):
    images = torch.randint(0, 256, (B, C, H, W)).to(torch.uint8)
    boxes = torch.zeros(B, 5, dtype=torch.int64)
    boxes[::2, :4] = torch.tensor([1, 2, H - 4, W - 3])
    boxes[:, 4] = torch.randint(-(2**63), 2**63 - 1, (B,))
    return images, boxes, torch.randn(C, 256), normal_levels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [(4, 3, 32, 32), (5, 3, 20, 36), (1, 1, 17, 9)], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_backends_mix_to_the_same_bits(backend, size, mix, dtype, device):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    weight, cut = MIXES[mix]
    device = "cpu" if backend == "cpp" else device
    inputs = mix_inputs(*size)
    options = {"weight": weight, "cut": cut, "dtype": dtype}
    expected = mix_and_erase(*inputs, **options, backend="reference")
    out = mix_and_erase(*(t.to(device) for t in inputs), **options, backend=backend)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_erasing_fills_the_box_with_its_own_noise(backend, device):
    device = "cpu" if backend == "cpp" else device
    images, boxes, table, noise = mix_inputs(4, 3, 32, 32)
    inputs = [t.to(device) for t in (images, boxes, table, noise)]
    out = mix_and_erase(*inputs, backend=backend).cpu()
    plain = torch.stack([table[c][images[:, c].long()] for c in range(3)], 1)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[1:29, 2:31] = True
    assert torch.equal(out[1::2], plain[1::2])
    assert torch.equal(out[::2][..., ~inside], plain[::2][..., ~inside])
    # one value per pixel and channel, apart in the two images
    values = out[::2][..., inside]
    assert abs(float(values.mean())) < 0.1
    assert abs(float(values.std()) - 1) < 0.1
    assert len(values.unique()) > 0.9 * values.numel()


def test_empty_batches(device):
    images = pictures(3, 8, 8)
    none = torch.zeros(0, dtype=torch.int64)
    for backend in ["reference", "triton"] + ["cpp"] * (ext_missing() is None):
        out = run(
            images, none, whole(0, 8, 8).view(0, 6), torch.zeros(0, 2, 8).double(), backend, device
        )
        assert out.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = pictures(3, 8, 8)
    plan = draw_plan(AugmentConfig(), 0, 0, torch.arange(5), 8, 8)
    arguments = (images, torch.arange(5), plan.crops, plan.layers, FILL, backend)
    torch.library.opcheck(torch.ops.lsmha_fast.augment.default, arguments)
    mixed = (*mix_inputs(4, 3, 8, 8), 0.3, [], torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.lsmha_fast.mix_and_erase.default, mixed)


def test_bad_arguments_are_refused():
    images, index = pictures(3, 8, 8), torch.arange(2)
    crops, layers = whole(2, 8, 8), torch.zeros(2, 1, 8).double()
    with pytest.raises(ValueError, match=r"uint8 \(B, 1 or 3, H, W\), got float32"):
        augment(images.float(), index, crops, layers, FILL)
    with pytest.raises(ValueError, match=r"crops must be int32 \(2, 6\), got int64"):
        augment(images, index, crops.long(), layers, FILL)
    with pytest.raises(ValueError, match=r"fill must be 3 bytes, got \[1, 2, 256\]"):
        augment(images, index, crops, layers, [1, 2, 256])
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        augment(images, index, crops, layers, FILL, backend="cuda")
    inputs = mix_inputs(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"cut must be .* in 8x8, got \[0, 9, 0, 3\]"):
        mix_and_erase(*inputs, cut=[0, 9, 0, 3])
    with pytest.raises(ValueError, match="weight must lie"):
        mix_and_erase(*inputs, weight=1.5)


@needs_cpp
@pytest.mark.parametrize("at, value", [(0, -1), (0, 1), (3, 9), (2, 0), (4, 2)])
def test_the_native_kernel_refuses_boxes_outside(at, value):
    crops = whole(1, 8, 8)
    crops[0, at] = value
    arguments = pictures(3, 8, 8), torch.zeros(1).long(), crops, torch.zeros(1, 0, 8).double(), FILL
    with pytest.raises(RuntimeError, match="is not"):
        augment(*arguments, backend="cpp")


@pytest.mark.triton
def test_triton_kernels_build():
    configs = compile_budgeted("lsmha_fast.ops.augment._triton")
    assert len(configs) == 6
    for config in configs:
        assert_clean(config)
