"""DDP and FSDP2 on two gloo processes give the gradients of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path


def test_two_ranks_equal_one_process(tmp_path):
    script = Path(__file__).with_name("ddp_ranks.py")
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]
