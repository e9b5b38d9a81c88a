"""Run PyTorch's own tests of multi-head attention with our class in the place of its class.

    python scripts/torch_suite.py PYTORCH/test/nn/test_multihead_attention.py \
        PYTORCH/test/test_transformers.py -k "TestMultiheadAttention or TestTransformers"

The files belong to PyTorch's source, not to this repository, and need `pip install expecttest`.
Every file runs twice, each in a process of its own; printed are the counts, and each test whose
outcomes differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

CLASSES = {"torch": "nn.MultiheadAttention", "ours": "LSMultiHeadAttention"}


def swap() -> None:
    """Put LSMultiHeadAttention where PyTorch and its tests look for nn.MultiheadAttention."""
    import torch

    from lsmha_fast import LSMultiHeadAttention

    for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation):
        module.MultiheadAttention = LSMultiHeadAttention
    torch.nn.modules.transformer.MultiheadAttention = LSMultiHeadAttention


def run_file(which: str, file: str, expression: str, report: str) -> int:
    """In a process of its own: pytest on one file, with its outcomes written to `report`."""
    import pytest

    if which == "ours":
        swap()
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", expression]
    return pytest.main([file, *options])


def outcomes(which: str, file: str, expression: str) -> dict[str, str]:
    """Test -> "passed", "skipped", or "failed: " and the first line of the reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder, "report.xml"))
        command = [sys.executable, __file__, file, "-k", expression, "--run", which, report]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: tests failed, which is what we are here to see
            sys.exit(f"{file} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{c.get('classname')}.{c.get('name')}": _outcome(c) for c in cases}


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            first = (found.get("message") or "").splitlines()[:1]
            return "skipped" if kind == "skipped" else f"failed: {''.join(first)}"
    return "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="test files of PyTorch's source")
    parser.add_argument("-k", dest="expression", default="", help="as of pytest")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        which, report = arguments.run
        sys.exit(run_file(which, arguments.files[0], arguments.expression, report))
    for file in arguments.files:
        if not Path(file).is_file():
            sys.exit(f"no such file: {file}")
        results = {which: outcomes(which, file, arguments.expression) for which in CLASSES}
        print(file)
        for which, name in CLASSES.items():
            counts = Counter(o.partition(":")[0] for o in results[which].values())
            print(f"  {name:24}", ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
        for test, theirs in results["torch"].items():
            ours = results["ours"].get(test, "did not run")
            if theirs != ours and "failed" in theirs + ours:
                print(f"  {test}\n    torch: {theirs}\n    ours:  {ours}")


if __name__ == "__main__":
    main()
