"""The fields of all heads, packed for the page's script."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

from ..shp import SHP
from ..symmetry import symmetry_breaking
from .source import Measured


def page_data(measured: Measured) -> dict[str, Any]:
    """What the page's script draws from: names, clusters, and the fields as their factors.

    The K x K matrix of a head is the product of two K x D factors, which are far smaller. Each
    column is kept as 16-bit integers; `scale` (H, D) turns products of them back into fields.
    `own` (H, K) is the own field of a recognised label, 1 to 255 for 0 to the largest field of the
    head, and 0 for a label that is not recognised.
    """
    shp = measured.shp
    blocks = []
    for m, found in enumerate(measured.clusters):
        means, weights, scale = _factors(shp, m)
        shares = symmetry_breaking(shp.matrix(m), found, draws=1).label_by_head.T
        own = torch.where(found.recognized, 1 + 254 * shares.clamp(0, 1), 0.0).round()
        blocks.append(
            {
                "name": shp.block_names[m],
                "heads": means.shape[0],
                "rank": means.shape[2],
                "means": _pack(means),
                "weights": _pack(weights),
                "scale": _pack(scale),
                "assignment": _pack(found.assignment.numpy().astype("<i2")),
                "order": _pack(found.order.numpy().astype("<i2")),
                "own": _pack(own.numpy().astype("u1")),
                "clusters": found.number.tolist(),
                "noise": (found.internal_noise + found.external_noise).tolist(),
            }
        )
    choices = measured.summary["choices"]
    return {
        "classes": list(shp.class_names),
        "threshold": float(choices["threshold"]),
        "normalize": choices["normalize"],
        "blocks": blocks,
    }


def _factors(shp: SHP, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means and weights of a block, (H, K, D) int16 each, and their scale (H, D) float32."""
    counts = shp.counts.double()[:, None, None]
    means = (shp.sums[block] / counts.clamp(min=1)).transpose(0, 1)  # (H, K, D)
    weights = shp.fc_weight[block].double().transpose(0, 1)
    if shp.bias:  # one more channel: 1 for every label with images, and the bias
        there = (shp.counts > 0).double().expand(len(means), -1)[..., None]
        means = torch.cat([means, there], 2)
        bias = shp.fc_bias[block].double().expand(len(weights), -1)[..., None]
        weights = torch.cat([weights, bias], 2)
    packed, scale = [], torch.ones(means.shape[0], means.shape[2], dtype=torch.float64)
    for factor in (means, weights):
        step = factor.abs().amax(1).clamp(min=1e-30) / 32767
        packed.append((factor / step[:, None]).round().numpy().astype("<i2"))
        scale = scale * step
    return packed[0], packed[1], scale.numpy().astype("<f4")


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
