"""Image files of any kind -> bytes (3, size, size); what cannot be read is one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# decoders written in C or Python that need no other program, as EPS does
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# 100 million pixels take 400 MB as RGBA; what claims more is refused before it is decoded
MAX_PIXELS = 100_000_000
# what a transparent pixel shows
GROUND = (255, 255, 255, 255)


class ImageError(ValueError):
    """A file that cannot be read as an image; the message is one line that names it."""


def read_image(path: str | Path, size: int) -> Tensor:
    """Read an image file as a model takes it.

    The picture is turned as its EXIF orientation says, laid on white where it is transparent, its
    first frame taken where it moves, scaled so that the shorter side fits, and cropped in the
    middle.

    Args:
        path: a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file.
        size: rows and columns of the result.

    Returns:
        (3, size, size) uint8, RGB.

    Raises:
        ImageError: no such file, not an image, damaged, or of more than `MAX_PIXELS` pixels.
        ModuleNotFoundError: Pillow is missing.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():  # a folder, a pipe or nothing
        raise ImageError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read"
                )
            # decoders of JPEG skip detail that the small picture would not show
            image.draft("RGB", (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(image)
            picture = ImageOps.fit(_as_rgb(picture), (size, size), Image.Resampling.BICUBIC)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image ({', '.join(FORMATS)} are read)") from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        text = " ".join(str(error).split())
        raise ImageError(f"{path}: damaged ({type(error).__name__}: {text})") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparent pixels on white; 16 bits and floats per pixel are scaled to 8."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = 65535.0 if image.mode.startswith("I") else max(values.max(), 1.0)
        image = Image.fromarray(np.uint8(np.clip(values / top, 0, 1) * 255 + 0.5))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, GROUND), rgba)
    return image.convert("RGB")
