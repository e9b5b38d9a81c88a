"""The Python code of README and docs runs as it stands, with small data for the names it uses."""

import functools
import re

import pytest
import torch
from documents import DOCUMENTS, blocks

from lsmha_fast import CCT, analysis, create_model, data

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODE = {path.name: [b for b in blocks(path) if b.language == "python"] for path in DOCUMENTS}
# our parameter -> its name in a published checkpoint
PUBLISHED = {
    r"stem\.convs\.(\d+)\.": r"tokenizer.conv_layers.\1.0.",
    r"pool\.": "classifier.attention_pool.",
    r"(.*)\.in_proj_": r"classifier.\1.qkv.",
    r"(.*)\.out_proj\.": r"classifier.\1.proj.",
    r"": "classifier.",
}


def published(state):
    """A state_dict as Compact-Transformers would write it."""
    renames = PUBLISHED.items()
    rules = {key: next(r for r in renames if re.match(r[0], key)) for key in state}
    return {re.sub("^" + ours, theirs, key): state[key] for key, (ours, theirs) in rules.items()}


def small_model():
    return CCT(depth=2, dim=32, num_classes=100, img_size=32, num_heads=4)


def batches():
    return list(zip(torch.randn(2, 4, 3, 32, 32), torch.arange(8).view(2, 4), strict=True))


def data_set(name, split, *_, **__):
    """A few images under the name of a data set; enough for a step or two of the documents."""
    images = torch.randint(0, 256, (1500, 3, 32, 32), dtype=torch.uint8)
    names = tuple(str(k) for k in range(100))
    stats = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return data.ImageDataset(name, images, torch.arange(1500) % 100, names, *stats)


def readme(patch):
    pytest.importorskip("timm")
    checkpoint = published(create_model("cct_7_3x1_32", 100).state_dict())
    tokens, images = torch.randn(2, 16, 256), torch.randn(2, 3, 32, 32)
    return {"tokens": tokens, "images": images, "published_state_dict": checkpoint}


def with_data(patch):
    patch.setattr(data, "load_dataset", data_set)
    return {"root": "DIR"}


def drop_in(patch):
    return {"model": torch.nn.TransformerEncoderLayer(32, 4)}


def latency(patch):
    images = torch.randn(2, 3, 32, 32)
    return {"model": small_model().eval(), "images": images, "pictures": images.to(torch.uint8)}


def pruning(patch):
    given = {"model": small_model()}
    probes = analysis.train_probes(given["model"], batches(), epochs=1)
    return {**given, "shp": analysis.single_head_performance(given["model"], probes, batches())}


def shp(patch):
    timm = pytest.importorskip("timm")
    create, train = timm.create_model, analysis.train_probes
    # without the weights, which would be downloaded, for small images, and with few epochs
    small = {"pretrained": False, "img_size": 32}
    patch.setattr(timm, "create_model", lambda name, **more: create(name, **{**more, **small}))
    patch.setattr(analysis, "train_probes", functools.partial(train, epochs=1))
    given = {"names": [str(k) for k in range(100)], "r": 0, "w": 1}
    return {**given, "model": small_model(), "train_batches": batches(), "test_batches": batches()}


def report(patch):
    patch.setattr("lsmha_fast.analysis.report.plot_shp", lambda *_, **__: [])  # it takes its time
    exec(CODE["shp.md"][0].text.replace("runs/digits/shp", "runs/a/shp"), shp(patch))
    return {}


GIVEN = {
    "README.md": readme, "augment.md": with_data, "data.md": with_data, "drop_in.md": drop_in,
    "latency.md": latency, "pruning.md": pruning, "report.md": report, "shp.md": shp,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CODE if CODE[n]])
def test_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = GIVEN[name](monkeypatch)
    for block in CODE[name]:
        code = "\n" * (block.line - 1) + block.text.replace('"cuda"', f'"{DEVICE}"')
        exec(compile(code, str(block.document), "exec"), space)
