"""The published recipe, setting by setting, and timm's own schedule and parameter groups."""

import pytest
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from lsmha_fast._train_command import config_flags, given_fields
from lsmha_fast.cli import main, make_parser
from lsmha_fast.nn.blocks import CONV_FORMS as FORMS_OF_THE_MODEL
from lsmha_fast.train import PRESETS, TrainConfig, preset
from lsmha_fast.train.config import CONV_FORMS
from lsmha_fast.train.optim import make_optimizer
from lsmha_fast.train.recipe import resolve
from lsmha_fast.train.run import build_model
from lsmha_fast.train.schedule import config_lr

# the recipe of SHI-Labs/Compact-Transformers for CIFAR-100: configs/pretrained, and train.py with
# timm's defaults where a config says nothing
COMMON = {
    "data": "cifar100",
    "dim": 256,
    "depth": 7,
    "num_heads": (4,) * 7,
    "head_dim": (64,) * 7,
    "conv_blocks": 0,
    "pre_norm": False,
    "attn_drop": 0.1,
    "drop_path_by_block": (0.0, 0.016667, 0.033333, 0.05, 0.066667, 0.083333, 0.1),
    "optimizer": "AdamW",
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 10,
    "cooldown_epochs": 10,
    "lr_per_epoch": True,
    "batch_size": 128,
    "drop_last": True,
    "train_images": None,
    "label_smoothing": 0.1,
    "augment": True,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "crop_scale": (0.8, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "interpolation": "random",
    "flip": 0.5,
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch_prob": 0.5,
    "amp": "auto",
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "seed": 42,
}
TABLE = {
    "compact-300": COMMON
    | {
        "model": "cct_7_3x1_32",
        "epochs": 300,
        "total_epochs": 310,
        "lr": 6e-4,
        "weight_decay": 0.06,
        "positional_embedding": "learnable",
        "parameters": 3_783_269,
    },
    "compact-1500": COMMON
    | {
        "model": "cct_7_3x1_32_sine",
        "epochs": 1500,
        "total_epochs": 1510,
        "lr": 7e-4,
        "weight_decay": 0.05,
        "positional_embedding": "sine",
        "parameters": 3_717_733,
    },
    "compact-5000": COMMON
    | {
        "model": "cct_7_3x1_32_sine",
        "epochs": 5000,
        "total_epochs": 5010,
        "lr": 5e-4,
        "weight_decay": 0.05,
        "positional_embedding": "sine",
        "parameters": 3_717_733,
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_of_the_published_recipe(name):
    resolved = resolve(preset(name))
    assert {key: resolved[key] for key in TABLE[name]} == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_learning_rate_of_every_epoch_is_timms(name):
    config = preset(name)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=10,
        cooldown_epochs=10,
        min_lr=1e-5,
        warmup_lr=1e-6,
    )
    assert epochs == config.total_epochs
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        assert config_lr(config, epoch, 0.7) == pytest.approx(expected, rel=1e-12), epoch
        scheduler.step(epoch + 1)


@pytest.mark.parametrize("name", ["compact-300", "compact-1500", "hybrid-2-separable"])
def test_decayed_parameters_are_timms(name):
    config = preset(name)
    model = build_model(config, 100)
    ours = make_optimizer(model, config).param_groups
    timms = param_groups_weight_decay(model, weight_decay=config.weight_decay)
    by_decay = [
        {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups}
        for groups in (ours, timms)
    ]
    assert by_decay[0] == by_decay[1]
    if name == "compact-300":
        assert id(model.positional_emb) in by_decay[0][0.06]


def test_families():
    for heads in (4, 8, 16, 32, 64, 128, 256):
        assert preset(f"heads-{heads}").num_heads == heads
    free = resolve(preset("heads-100x4"))
    assert (free["num_heads"][0], free["head_dim"][0]) == (100, 4)
    for form in FORMS_OF_THE_MODEL:
        for k in range(1, 7):
            config = preset(f"hybrid-{k}-{form}")
            assert (config.conv_blocks, config.conv_form) == (k, form)
    assert CONV_FORMS == FORMS_OF_THE_MODEL


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_differs_only_where_its_name_says(name):
    changed = {
        key
        for key, value in vars(preset(name)).items()
        if value != getattr(preset("compact-300"), key)
    }
    allowed = {
        "compact": {"epochs", "lr", "model", "weight_decay"},
        "heads": {"num_heads", "head_dim"},
        "hybrid": {"num_heads", "conv_blocks", "conv_form"},
    }
    assert changed <= allowed[name.split("-")[0]]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        preset("compact-1500"),
        preset("hybrid-3-bottleneck", conv_hidden="macs", num_heads=(4, 8, 16, 32)),
        TrainConfig(augment=False, conv_residual=True, flip=0.0, crop_scale=(0.5, 1.0)),
    ],
)
def test_flags_of_a_config_give_it_back(config):
    args = make_parser().parse_args(["train", *config_flags(config)])
    assert TrainConfig(**given_fields(args)) == config


def test_dry_run_prints_the_recipe_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "compact-300", "--lr", "5e-4", "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for words in ("lr 0.0005", "epochs 300", "total epochs 310", "parameters 3783269"):
        assert words.split() in lines
    assert list(tmp_path.iterdir()) == []


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=r"--preset must be one of compact-300, .* got compact-30$"
    ):
        preset("compact-30")
