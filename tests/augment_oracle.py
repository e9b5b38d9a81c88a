"""What timm and Pillow make of one image, when the random numbers are given."""

from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment
from torchvision.transforms import functional

from lsmha_fast.ops.augment import common as codes

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


def layer(picture, row, fill):
    """One row of `layers` by Pillow's own functions."""
    code, number, *matrix = row
    if code == codes.AFFINE:
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            FILTERS[int(number)],
            fillcolor=colour(fill),
        )
    function = {
        codes.NONE: lambda p, _: p,
        codes.AUTO_CONTRAST: lambda p, _: ImageOps.autocontrast(p),
        codes.EQUALIZE: lambda p, _: ImageOps.equalize(p),
        codes.INVERT: lambda p, _: ImageOps.invert(p),
        codes.POSTERIZE: lambda p, bits: ImageOps.posterize(p, int(bits)),
        codes.SOLARIZE: lambda p, threshold: ImageOps.solarize(p, int(threshold)),
        codes.SOLARIZE_ADD: lambda p, add: auto_augment.solarize_add(p, int(add)),
        codes.COLOR: lambda p, f: ImageEnhance.Color(p).enhance(f),
        codes.CONTRAST: lambda p, f: ImageEnhance.Contrast(p).enhance(f),
        codes.BRIGHTNESS: lambda p, f: ImageEnhance.Brightness(p).enhance(f),
        codes.SHARPNESS: lambda p, f: ImageEnhance.Sharpness(p).enhance(f),
    }[int(code)]
    return function(picture, number)
