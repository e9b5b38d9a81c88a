"""Streaming gives what the whole block gives, within the stated memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes

from lsmha_fast.analysis import (
    SHP,
    find_clusters,
    signal_to_noise,
    single_head_performance,
    stream_block,
)


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 40 * 16, 1 << 30])
@pytest.mark.parametrize("normalize", ["matrix", "row"])
def test_equals_the_whole_block(chunk_bytes, normalize):
    model = TinyModel(shapes=((5, 2), (7, 3)))
    shp = single_head_performance(model, random_probes(model), random_batches())
    for m in range(2):
        found = find_clusters(shp.matrix(m), normalize=normalize, threshold=0.4)
        whole = signal_to_noise(shp.matrix(m), found)
        parts = stream_block(shp, m, normalize=normalize, threshold=0.4, chunk_bytes=chunk_bytes)
        for name in parts._fields[:-1]:
            assert torch.equal(getattr(parts, name), getattr(found, name)), name
        assert torch.equal(parts.snr.signal, whole.signal)
        assert torch.equal(parts.snr.noise, whole.noise)
        torch.testing.assert_close(parts.snr.unclipped, whole.unclipped)


def test_saved_without_matrices(model, batches, tmp_path):
    shp = single_head_performance(model, random_probes(model), batches)
    small, large = shp.save(tmp_path / "a.npz", matrices=False), shp.save(tmp_path / "b.npz")
    assert small.stat().st_size < large.stat().st_size
    assert torch.equal(SHP.load(small).matrix(1), shp.matrix(1))


def test_memory_stays_under_the_bound():
    """400 labels, 3 blocks of 64 heads; the script exits with 1 above the bound. One whole block
    at a time would take 260 MiB with its temporaries (`--chunk-mib 100000`)."""
    root = Path(__file__).parents[2]
    sizes = {"classes": 400, "heads": 64, "head-dim": 2, "depth": 3, "tokens": 16, "chunk-mib": 32}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.shp_scale", *options],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clusters per head" in done.stdout
