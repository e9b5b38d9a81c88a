"""Arguments of `lsmha latency`, `arch`, `export` and `classify`; heavy imports stay inside."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._cli_types import positive_float, positive_int
from .train.config import CONV_FORMS, parse_per_block

DTYPES = ("float32", "bfloat16", "float16")
VARIANTS = ("optimized", "eager", "compiled", "published", "published compiled", "onnxruntime")
FORMATS = ("safetensors", "onnx", "pt2")


def add_deploy_commands(commands: Any) -> None:
    """Add the commands that measure and use a trained model."""
    _add_latency(commands)
    _add_arch(commands)
    export = commands.add_parser("export", help="write the model of a run for other programs")
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("--format", choices=FORMATS, required=True)
    export.add_argument("--out", type=Path, help="file to write (default: RUN/model.FORMAT)")
    export.set_defaults(run=run_export)
    classify = commands.add_parser("classify", help="likeliest labels of image files")
    classify.add_argument("images", nargs="+", metavar="IMAGE")
    classify.add_argument("--run", dest="run_dir", type=Path, required=True, metavar="RUN")
    classify.add_argument("--top", type=positive_int, default=5, help="labels (default: 5)")
    classify.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    classify.set_defaults(run=run_classify)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-classes", type=positive_int, default=100, help="default: 100")
    text = "one number, or one per transformer block: 16 or 16,32"
    parser.add_argument("--num-heads", type=parse_per_block, help=text)
    parser.add_argument("--head-dim", type=positive_int)
    parser.add_argument("--conv-blocks", type=int, default=0, help="default: 0")
    parser.add_argument("--conv-form", choices=CONV_FORMS, default="full", help="default: full")
    parser.add_argument("--pre-norm", action="store_true")


def _add_latency(commands: Any) -> None:
    latency = commands.add_parser("latency", help="time of a call, beside the baselines")
    latency.add_argument("run_dirs", type=Path, nargs="*", metavar="RUN", help="run folders")
    latency.add_argument("--model", help="a model by name, untrained, in place of runs")
    _add_model(latency)
    latency.add_argument("--batch", type=_list_of(positive_int), default=(1, 8, 64, 512))
    latency.add_argument("--dtype", type=_list_of(str, DTYPES), default=("float32",))
    latency.add_argument("--variants", type=_list_of(str, VARIANTS), default=VARIANTS)
    text = "seconds per variant and batch (default: 2)"
    latency.add_argument("--seconds", type=positive_float, default=2.0, help=text)
    text = "leave out what would take longer for one call (default: 10 s)"
    latency.add_argument("--longest-call", type=positive_float, default=10.0, help=text)
    latency.add_argument("--threads", type=positive_int, help="of PyTorch on a CPU")
    text = "count the processor time of one thread, where the machine does other work, too"
    latency.add_argument("--cpu-time", action="store_true", help=text)
    latency.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    latency.add_argument("--out", type=Path, help="folder for summary.json, with --model")
    latency.set_defaults(run=run_latency)


def _add_arch(commands: Any) -> None:
    arch = commands.add_parser("arch", help="what every part of a model costs")
    arch.add_argument("model", nargs="?", default="cct_7_3x1_32", help="default: cct_7_3x1_32")
    _add_model(arch)
    arch.set_defaults(run=run_arch)


def _list_of(parse: Callable, allowed: tuple[str, ...] | None = None) -> Callable:
    """A parser of "a,b,c"."""

    def read(text: str) -> tuple:
        values = tuple(parse(part.strip()) for part in text.split(","))
        for value in values:
            if allowed is not None and value not in allowed:
                names = ", ".join(allowed)
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {names}")
        return values

    read.__name__ = "list"
    return read


def _make_model(name: str, args: argparse.Namespace) -> Any:
    from .models import create_model

    return create_model(
        name,
        args.num_classes,
        args.num_heads,
        args.head_dim,
        args.conv_blocks,
        conv_form=args.conv_form,
        pre_norm=args.pre_norm,
    )


def run_latency(args: argparse.Namespace) -> None:
    """Measure runs, or one model by name."""
    from ._latency_command import LatencyOptions, latency_of_model, latency_of_runs

    if (args.model is None) == (not args.run_dirs):
        raise ValueError("give run folders, or --model NAME, and not both")
    options = LatencyOptions(
        batches=args.batch,
        dtypes=args.dtype,
        variants=args.variants,
        seconds=args.seconds,
        longest_call=args.longest_call,
        threads=args.threads,
        cpu_time=args.cpu_time,
        device=args.device,
    )
    if args.model is None:
        lines = latency_of_runs(args.run_dirs, options)
    else:
        model = _make_model(args.model, args)
        lines = latency_of_model(args.model, model, options, args.out)
    for line in lines:
        print(line, flush=True)


def run_arch(args: argparse.Namespace) -> None:
    """Print the costs of a model part by part."""
    from .models.arch import model_costs

    print(f"{'part':<26} {'params':>10} {'MACs':>13} {'exps':>10} {'activations':>11} {'steps':>5}")
    for row in model_costs(_make_model(args.model, args)):
        print(
            f"{row.name:<26} {row.params:>10} {row.macs:>13} {row.exps:>10} "
            f"{row.activations:>11} {row.steps:>5}"
        )


def run_export(args: argparse.Namespace) -> None:
    """Export the model of a run."""
    from ._export_command import export_run

    for line in export_run(args.run_dir, args.format, args.out):
        print(line, flush=True)


def run_classify(args: argparse.Namespace) -> int:
    """Classify image files; 1 where one could not be read."""
    from ._classify_command import classify

    return classify(args.images, args.run_dir, top=args.top, device=args.device)
