"""Hostile input at every entrance: the quick cases of hostile.py, which says what they are."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("hostile.py")
MEGABYTES = 1500
"""Of a job and what it imports: nothing is unpacked that only claims to be large."""


def test_nothing_hostile_runs_calls_writes_elsewhere_or_exhausts(tmp_path: Path) -> None:
    answer = tmp_path / "results.json"
    command = [sys.executable, str(PROGRAM), "--quick", "--json", str(answer)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert answer.exists(), done.stdout[-3000:]
    results = json.loads(answer.read_text())
    assert {result["name"]: result["wrong"] for result in results if result["wrong"]} == {}
    assert len({result["name"] for result in results}) == len(results) > 60
    assert max(result["megabytes"] for result in results) < MEGABYTES
    assert done.returncode == 0
