"""Real image files of every kind, and files that are none."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from lsmha_fast.deploy.images import ImageError, read_image  # noqa: E402

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two_halves(width, height):
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    return Image.fromarray(pixels)


def corners(tensor):
    """Colours a quarter in from top left, top right, bottom left, bottom right."""
    n = tensor.shape[-1]
    near, far = n // 4, n - 1 - n // 4
    return [tuple(tensor[:, i, j].tolist()) for i in (near, far) for j in (near, far)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "ppm", "webp", "jpg"])
@pytest.mark.parametrize("size", [(32, 32), (301, 200), (20, 33), (1, 1)], ids=str)
def test_formats_and_sizes(tmp_path, suffix, size):
    path = tmp_path / f"picture.{suffix}"
    two_halves(*size).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path, 32)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    if size == (32, 32) and suffix != "jpg":
        assert torch.equal(image, torch.from_numpy(np.array(two_halves(32, 32))).permute(2, 0, 1))
    elif size != (1, 1):
        expected = torch.tensor([RED, BLUE, RED, BLUE])
        assert (torch.tensor(corners(image)) - expected).abs().max() < 12


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: left becomes top
    two_halves(64, 64).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = torch.tensor(corners(read_image(tmp_path / "turned.jpg", 32)))
    assert (found - torch.tensor([RED, RED, BLUE, BLUE])).abs().max() < 12


MODES = {
    "grey": lambda: Image.new("L", (9, 9), 100),
    "bits": lambda: Image.new("1", (9, 9), 1),
    "16 bits": lambda: Image.fromarray(np.full((9, 9), 25700, np.uint16)),
    "grey with alpha": lambda: Image.new("LA", (9, 9), (100, 255)),
    "palette": lambda: Image.new("L", (9, 9), 100).quantize(),
}


@pytest.mark.parametrize("mode", MODES)
def test_grey_modes(tmp_path, mode):
    MODES[mode]().save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png", 8)
    assert torch.equal(image, torch.full_like(image, 255 if mode == "bits" else 100))


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == 255).all()
    Image.new("P", (9, 9), 3).save(tmp_path / "b.gif", transparency=3)
    assert (read_image(tmp_path / "b.gif", 8) == 255).all()


def test_floats_and_cmyk(tmp_path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert (read_image(tmp_path / "float.tiff", 8) == 128).all()
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    assert corners(read_image(tmp_path / "ink.jpg", 8))[0][0] > 200


def test_first_frame_of_what_moves(tmp_path):
    frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert corners(read_image(tmp_path / "moving.gif", 8)) == [RED] * 4


def png(width, height, body=b""):
    """A PNG file that claims a size, whatever its body holds."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def encoded(suffix="PNG"):
    file = io.BytesIO()
    two_halves(64, 64).save(file, suffix)
    return file.getvalue()


BAD = {
    "empty": (b"", "not an image"),
    "text": (b"hello" * 100, "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "half a PNG": (encoded()[:120], "damaged"),
    "half a JPEG": (encoded("JPEG")[:400], "damaged"),
    "bomb": (png(60000, 60000), "pixels"),
    "large": (png(12000, 12000), "pixels"),
    "short body": (png(50, 50, b"\0" * 20), "damaged"),
    "no columns": (png(0, 5), ""),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_is_no_image_is_one_clear_line(tmp_path, kind):
    data, reason = BAD[kind]
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ImageError, match=f"bad.png: .*{reason}") as error:
        read_image(tmp_path / "bad.png", 32)
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("missing.png", ".", "pipe"):
        with pytest.raises(ImageError, match="no such file"):
            read_image(tmp_path / name, 32)


def test_every_damaged_file_is_an_image_or_an_image_error(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "fuzz"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(kind), np.uint8)
        for _ in range(60):
            data = whole[: random.integers(1, len(whole) + 1)].copy()
            where = random.integers(len(data), size=random.integers(1, 9))
            data[where] = random.integers(256, size=len(where))
            path.write_bytes(data.tobytes())
            try:
                shape, message = read_image(path, 16).shape, ""
            except ImageError as error:
                shape, message = (3, 16, 16), str(error)
            assert shape == (3, 16, 16)
            assert "\n" not in message
