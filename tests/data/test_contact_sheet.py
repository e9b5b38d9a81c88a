"""A contact sheet is a readable PNG that shows the images themselves."""

import numpy as np
import pytest
import torch

from lsmha_fast import data
from lsmha_fast.data import DatasetError, ImageDataset, picture


def colours(names=("red", "green", "$dollar_")):
    images = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(9) % 3
    images[torch.arange(9), labels] = 255
    return ImageDataset("colours", images, labels, names, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_sheet_shows_every_class(tmp_path):
    from PIL import Image

    path = data.contact_sheet(colours(), tmp_path / "sheet.png", per_class=2)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for channel in range(3):
        pure = (pixels == 255 * np.eye(3, dtype=np.uint8)[channel]).all(-1)
        # two images of at least 50 pixels a side
        assert pure.sum() > 2 * 50 * 50


def test_one_hundred_classes_fit(tmp_path):
    from PIL import Image

    dataset = data.load_dataset("glyphs100", "test", size=400)
    path = data.contact_sheet(dataset, tmp_path / "sheet.png")
    width, height = Image.open(path).size
    assert 800 < width < 2000
    assert 800 < height < 2000
    assert picture._title(dataset).startswith("glyphs100-easy (generated): 400 images 32x32")


def test_class_with_few_images_leaves_white():
    strip = picture._strip(colours(), 0, 5)
    assert strip.shape == (8, 5 * 10 - 2, 3)
    assert (strip[:, 30:] == 255).all()
    assert (strip[:, :8] == [255, 0, 0]).all()


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"per_class must lie in 1\.\.20, got 0"):
        data.contact_sheet(colours(), tmp_path / "sheet.png", per_class=0)
    with pytest.raises(DatasetError, match="cannot write .*nowhere"):
        data.contact_sheet(colours(), tmp_path / "nowhere" / "sheet.png")
