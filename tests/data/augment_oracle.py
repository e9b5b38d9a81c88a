"""What timm and Pillow make of one image, when the random numbers are given."""

from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional

from lsmha_fast.data.draws import NAMES

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def to_pil(image):
    """(C, H, W) uint8 -> a picture of mode L or RGB."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def to_tensor(picture):
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def colour(fill):
    return tuple(fill) if len(fill) > 1 else fill[0]


def operation(picture, name, magnitude, sign, kind, fill):
    """One of timm's operations at a magnitude."""
    level = auto_augment.LEVEL_TO_ARG[name]
    # timm negates where random() > 0.5
    with mock.patch("random.random", return_value=0.9 if sign < 0 else 0.1):
        arguments = () if level is None else level(magnitude, {})
    options = {"fillcolor": colour(fill), "resample": FILTERS[kind]}
    return auto_augment.NAME_TO_OP[name](picture, *arguments, **options)


def crop(picture, row):
    """Resized crop and flip as a row of `crops` says."""
    top, left, height, width, kind, flip = row
    size = (picture.height, picture.width)
    kinds = (functional.InterpolationMode.BILINEAR, functional.InterpolationMode.BICUBIC)
    picture = functional.resized_crop(picture, top, left, height, width, size, kinds[kind])
    return functional.hflip(picture) if flip else picture


def index_of(name):
    return NAMES.index(name)
