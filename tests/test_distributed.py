"""Training with DistributedDataParallel: the gradients of several processes, as eager has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gems_only

pytestmark = [
    gems_only,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch that is alone"),
]
PROGRAM = Path(__file__).parent / "distributed_program.py"
RANKS = 2


def test_processes_train_together(tmp_path: Path) -> None:
    """Compiled from outside, cut where a bucket of gradients is full, and from within; and in eager
    mode with our kernels."""
    command = [sys.executable, str(PROGRAM)]
    environment = {**os.environ, "GEMS_CACHE": "0"}
    many = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in many]
    finally:
        for process in many:
            process.kill()
    for found in [json.loads(out.splitlines()[-1]) for out in said]:
        assert found["around"] < 1e-6 and found["within"] < 1e-6
        assert found["eager"] < 1e-6 and found["served"] > 20
        assert found["alone"] > 1e-4  # gradients were shared: one process by itself goes elsewhere
        assert found["graphs"] >= 4, "the model was not cut between its buckets"
        assert found["kernels"] >= 4
