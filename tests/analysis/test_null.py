"""Null models show no signal where there is none, and the planted signal stands out from them."""

import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes
from torch import nn

from lsmha_fast.analysis import (
    BlockProbe,
    Probes,
    find_clusters,
    measure_null,
    signal_to_noise,
    single_head_performance,
)
from lsmha_fast.analysis.null import null_lines
from lsmha_fast.analysis.null import random_probes as random_probes_like

K = 8


class OneHeadPerLabel(nn.Module):
    """Head h gives 1 for images of label h and noise otherwise; images are one-hot labels."""

    def forward_with_heads(self, images):
        return images, (images[:, None, :, None].expand(-1, 3, -1, -1) * 1.0,)


def planted():
    labels = torch.arange(400) % K
    generator = torch.Generator().manual_seed(0)
    images = nn.functional.one_hot(labels, K) + 0.1 * torch.randn(400, K, generator=generator)
    batches = list(zip(images.split(50), labels.split(50), strict=True))
    probe = BlockProbe(torch.zeros(K, 1), torch.eye(K)[:, :, None], torch.zeros(K))
    return OneHeadPerLabel(), Probes((probe,), ("block 1",)), batches


def test_planted_signal_stands_out():
    model, probes, batches = planted()
    shp = single_head_performance(model, probes, batches)
    own = shp.matrices[0].diagonal(dim1=1, dim2=2)  # (H, K)
    assert torch.allclose(own, torch.eye(K), atol=0.1)
    null = measure_null(model, probes, batches, draws=4)
    for draw in null.labels:
        # every label gets the same mixture of images
        assert (draw.matrices[0].diagonal(dim1=1, dim2=2) < 0.4).all()
        assert torch.equal(draw.counts, shp.counts)
        torch.testing.assert_close(draw.sums[0].sum(0), shp.sums[0].sum(0))
    truth = signal_to_noise(shp.matrices[0], find_clusters(shp.matrices[0]))
    assert truth.mean_snr == float("inf")  # each label has one head, no head a wrong label
    for kind, draws in null.numbers(0).items():
        assert len(draws) == 4
        assert all(10 * n["snr_unclipped"] < truth.mean_unclipped for n in draws), kind
        assert all(n["snr"] < 2 for n in draws), kind


def test_draws_differ_and_the_seed_decides(model, batches):
    probes = random_probes(model)
    first, again = (measure_null(model, probes, batches, seed=3) for _ in range(2))
    other = measure_null(model, probes, batches, seed=4)
    for kind in ("labels", "probes"):
        a, b, c = (getattr(n, kind) for n in (first, again, other))
        assert len(a) == 3
        assert all(torch.equal(x.sums[1], y.sums[1]) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0].sums[1], c[0].sums[1])
        assert not torch.equal(a[0].sums[1], a[1].sums[1])


def test_one_pass_of_the_model_and_of_the_truth(batches):
    model = TinyModel()
    probes = random_probes(model)
    null = measure_null(model, probes, batches, draws=2)
    assert model.calls == len(batches)
    # random probes see the true labels: the same as measuring with them alone
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randperm(sum(len(y) for _, y in batches), generator=generator)
    for draw in null.probes:
        alone = single_head_performance(model, random_probes_like(probes, generator), batches)
        for a, b in zip(draw.sums, alone.sums, strict=True):
            torch.testing.assert_close(a, b)
        assert all(map(torch.equal, draw.fc_weight, alone.fc_weight))


def test_lines_say_which_null(model, batches):
    null = measure_null(model, random_probes(model), batches, draws=1)
    labels, probes = null_lines(null.numbers(1))
    assert labels.startswith("  null, permuted labels: SNR ")
    assert probes.startswith("  null, random probes: SNR ")


def test_bad_input_is_an_error(model):
    probes, batches = random_probes(model), random_batches()
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        measure_null(model, probes, batches, draws=0)
    with pytest.raises(ValueError, match="one-way iterator"):
        measure_null(model, probes, iter(batches))
    with pytest.raises(ValueError, match="no batches"):
        measure_null(model, probes, [])
