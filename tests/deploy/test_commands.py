"""`lsmha export` and `classify` on a run folder; the exported files in fresh processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from lsmha_fast import create_model
from lsmha_fast.cli import main
from lsmha_fast.data import normalize
from lsmha_fast.data.facts import dataset_facts
from lsmha_fast.train import TrainConfig

save_file = pytest.importorskip("safetensors.torch").save_file
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

FACTS = dataset_facts("digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(data="digits", model="cct_2_3x2_32", num_heads=16, conv_blocks=1)
    torch.manual_seed(0)
    model = create_model(config.model, 10, 16, conv_blocks=1)
    (folder / "config.json").write_text(config.to_json())
    save_file(model.state_dict(), folder / "best.safetensors")
    return folder, model.eval()


def expected(model, images):
    with torch.no_grad():
        return model(normalize(images, FACTS.mean, FACTS.std))


def test_facts():
    for name in ("digits", "glyphs100", "cifar100"):
        names, mean, std = dataset_facts(name)
        assert len(names) == (10 if name == "digits" else 100)
        assert len(mean) == len(std) == 3


def test_pt2_runs_in_a_fresh_process_without_this_package(run, tmp_path, capsys):
    folder, model = run
    assert main(["export", str(folder), "--format", "pt2", "--out", str(tmp_path / "m.pt2")]) == 0
    assert "checked against the trained model" in capsys.readouterr().out
    assert json.loads((tmp_path / "m.pt2.json").read_text())["labels"] == list(FACTS.class_names)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "images = torch.load('images.pt')\n"
        "torch.save(torch.export.load('m.pt2').module()(images), 'logits.pt')\n"
        "assert 'lsmha_fast' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected(model, images))


def test_onnx(run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, model = run
    path = tmp_path / "m.onnx"
    assert main(["export", str(folder), "--format", "onnx", "--out", str(path)]) == 0
    assert "checked against the trained model" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 5):
        images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected(model, images), rtol=1e-4, atol=1e-5)


def test_safetensors(run, capsys):
    folder, _ = run
    assert main(["export", str(folder), "--format", "safetensors"]) == 0
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    assert weights["stem.weight0"].shape[1] == 4  # red, green, blue, ones


def test_classify_goes_on_after_bad_files(run, tmp_path, capsys):
    folder, model = run
    pixels = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    names = [str(tmp_path / name) for name in ("0.png", "bad.png", "1.png", "missing.png")]
    assert main(["classify", *names, "--run", str(folder), "--top", "3"]) == 1
    out, err = capsys.readouterr()
    assert [line.partition(": error: ")[2].partition(":")[0] for line in err.splitlines()] == names[
        1::2
    ]
    logits = expected(model, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    best = [FACTS.class_names[k] for k in logits.argmax(1)]
    assert [line.split(": ")[1].split()[0] for line in out.splitlines()] == best
    assert out.count("%") == 6
    assert main(["classify", names[0], "--run", str(folder)]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["latency"], "run folders, or --model"),
        (["latency", "--model", "cct_9_3x1_32"], "depth 9"),
        (["latency", "no-such-run"], "no run folder"),
        (["latency", "--model", "cct_2_3x2_32", "--cpu-time", "--threads", "2"], "one thread"),
        (["classify", "x.png", "--run", "no-such-run"], "no run folder"),
        (["export", "no-such-run", "--format", "pt2"], "no run folder"),
        (["arch", "cct_7"], "unknown model"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_latency_and_arch_print_tables(capsys):
    options = ["--seconds", "0.02", "--batch", "1", "--variants", "optimized,eager"]
    assert main(["latency", "--model", "cct_2_3x2_32", *options]) == 0
    assert "optimized" in capsys.readouterr().out
    assert main(["latency", "--model", "cct_2_3x2_32", "--cpu-time", *options]) == 0
    assert "processor time of one thread" in capsys.readouterr().out
    assert main(["arch", "--conv-blocks", "2", "--num-heads", "64"]) == 0
    assert "block 7: 64 heads of 4" in capsys.readouterr().out


def test_latency_of_a_run_goes_into_its_folder(run, capsys):
    folder, _ = run
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n')
    options = ["--seconds", "0.02", "--batch", "1,2", "--variants", "optimized,published"]
    assert main(["latency", str(folder), *options]) == 0
    assert "/ published" in capsys.readouterr().out
    record = json.loads((folder / "latency" / "summary.json").read_text())
    assert [row["batch"] for row in record["rows"]] == [1, 1, 2, 2]
    assert (folder / "latency" / "pareto.png").read_bytes().startswith(b"\x89PNG")
