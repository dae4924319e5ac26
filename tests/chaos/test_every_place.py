"""SIGKILL and a full disk wherever the stages write, and losses that are not finite on one of two workers."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "pipeline" / "faults.py"
STAGES = {
    "shard": "kill -9 while sharding, up to 5 times",
    "train": "kill -9 at every file operation of training",
    "extract": "kill -9 while extracting, up to 5 times",
}


def row(stage: str) -> str:
    """The promise that a stage of the program belongs to."""
    if "disk full" in stage:
        return f"disk full: {stage.partition(',')[0]}"
    return STAGES.get(stage.partition(" ")[0], f"not finite: {stage}")


@pytest.mark.chaos
def test_places_drawn_by_chance(fault: Callable[[str], Any], chance: random.Random, tmp_path: Path) -> None:
    answer = tmp_path / "counts.json"
    words = ["--each", "3", "--seed", str(chance.randrange(10**6)), "--folder", str(tmp_path), "--json", str(answer)]
    done = subprocess.run([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = json.loads(answer.read_text())
    for stage, found in counts.items():
        count = fault(row(stage))
        count.injected += found["injected"]
        count.recovered(faults=found["survived"])
        count.wrong += found["wrong"]
    assert done.returncode == 0, done.stdout
    assert sum(found["injected"] for found in counts.values()) > 200
