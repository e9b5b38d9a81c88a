"""Try an installed lsmha_fast outside its sources: python try_installed.py README.md

The first example of the README with its gradient, and the time that importing the package adds to
importing torch, at most 0.15 s.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

import lsmha_fast

MOST_SECONDS = 0.15
IMPORT = (
    "import time, torch; start = time.perf_counter()\n"
    "import lsmha_fast; from lsmha_fast import LSMultiHeadAttention, create_model, ops\n"
    "print(time.perf_counter() - start)"
)


def main(readme: Path) -> None:
    """Raise where something does not hold."""
    where = Path(lsmha_fast.__file__)
    assert where.is_relative_to(sys.prefix), f"{where} is not installed"
    example = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL).group(1)
    space = {"tokens": torch.randn(2, 16, 256, requires_grad=True)}
    exec(example, space)
    space["heads"].square().sum().backward()
    assert space["tokens"].grad.isfinite().all()
    assert space["tokens"].grad.abs().sum() > 0
    command = [sys.executable, "-c", IMPORT]
    seconds = min(float(subprocess.check_output(command)) for _ in range(5))
    print(f"example of the README: done; import after torch: {seconds:.3f} s, best of 5")
    assert seconds < MOST_SECONDS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
