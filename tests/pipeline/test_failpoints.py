"""Failpoints: where they fire, how often, and that they are silent by default."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import failpoints, store


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_a_rule_fires_at_its_point_and_subject_alone(tmp_path: Path) -> None:
    failpoints.arm("publish:b=full")
    store.publish(str(tmp_path / "a"), b"1")
    with pytest.raises(OSError, match="No space left") as error:
        store.publish(str(tmp_path / "b"), b"1")
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nth_and_times_count_in_the_process(tmp_path: Path) -> None:
    failpoints.arm("create=full*2@3")
    outcomes = []
    for number in range(6):
        try:
            outcomes.append(store.create(str(tmp_path / str(number)), b""))
        except OSError:
            outcomes.append(None)
    assert outcomes == [True, True, None, None, True, True]


def test_times_count_over_processes_in_a_folder(tmp_path: Path) -> None:
    code = f"from pipeline import store; store.publish({str(tmp_path / 'file')!r}, b'whole')"
    environment = os.environ | {failpoints.VARIABLE: "write:file=kill*2", failpoints.FOLDER: str(tmp_path)}
    ends = [subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode for _ in range(4)]
    assert ends == [-9, -9, 0, 0]
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.glob("0-*")) == ["0-0", "0-1"]


@pytest.mark.parametrize("rules", ["publish", "publish=explode", "publish:a=kill*x"])
def test_a_rule_that_does_not_parse_is_refused(rules: str) -> None:
    with pytest.raises(ValueError, match="wanted POINT"):
        failpoints.arm(rules)
