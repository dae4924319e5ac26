"""The bounds of a process and of its children; what hangs or dies does so in a process of its own."""

import contextlib
import dataclasses
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import isolate
from pipeline.config import ShardRun

RUN = ShardRun(source="videos", out="data", stall_seconds=0.1)


def run_python(code: str) -> tuple[int, str, float]:
    """Run code in a fresh process; its exit status, output, and seconds after it said that it begins."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        begin = time.monotonic()
        said = process.stdout.read()
    return process.returncode, said, time.monotonic() - begin


DECODING = """
import ctypes, time
from pipeline import isolate
isolate._PERIOD = 0.1
with isolate.guarded({stall}, 1), isolate.decoding():
    print("begin", flush=True)
    {body}
print("end")
"""


@pytest.mark.parametrize("hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
def test_a_decoder_that_gives_no_frame_dies_even_if_it_holds_pythons_lock(hang: str) -> None:
    status, _, seconds = run_python(DECODING.format(stall=0.1, body=hang))
    assert status == -signal.SIGALRM
    assert 0.15 < seconds < 30


def test_frames_and_slow_storage_keep_a_decoder_alive() -> None:
    frames = "for _ in range(8): time.sleep(0.15); isolate.frame_came()"
    storage = "with isolate.storage(): time.sleep(1)"
    for body in (frames, f"\n    {storage}"):
        assert run_python(DECODING.format(stall=0.6, body=body))[:2] == (0, "end\n")


def test_time_in_storage_gives_the_decoder_no_new_time() -> None:
    body = "\n    while True:\n        time.sleep(0.1)\n        with isolate.storage(): pass"
    status, _, seconds = run_python(DECODING.format(stall=0.3, body=body))
    assert (status, seconds < 30) == (-signal.SIGALRM, True)


@pytest.mark.parametrize("inherited", ["signal.signal(14, signal.SIG_IGN)", "signal.pthread_sigmask(0, {14})"])
def test_the_clock_works_where_its_signal_is_ignored_or_blocked_and_leaves_that_as_it_was(inherited: str) -> None:
    state = "(signal.getsignal(14), signal.pthread_sigmask(0, []))"
    begin = f"import signal\n{inherited}\nbefore = {state}\n"
    after = f"print(before == {state})"
    assert run_python(begin + DECODING.format(stall=60, body="pass") + after)[:2] == (0, "end\nTrue\n")
    assert run_python(begin + DECODING.format(stall=0.1, body="time.sleep(60)"))[0] == -signal.SIGALRM


def test_memory_is_bounded_and_the_limits_are_afterwards_as_before() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(MemoryError), isolate.guarded(60, 0.5), isolate.decoding():
        np.empty(1 << 30, np.uint8)
    with isolate.guarded(60, 0.5), isolate.decoding():
        np.empty(100 << 20, np.uint8)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL)) == before
    np.empty(1 << 30, np.uint8)


def test_memory_that_was_short_is_remembered_until_the_end() -> None:
    code = (
        "import numpy as np\nfrom pipeline import isolate\nprint('begin', flush=True)\nwith isolate.guarded(60, 0.3):\n"
        "    print(isolate.memory_is_short())\n    np.empty(290_000_000, np.uint8)\n"
        "    print(isolate.memory_is_short())\nprint(isolate.memory_is_short())"
    )
    assert run_python(code)[1].split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        ("os.kill(os.getpid(), 9)", {"fault": ["crash", "died of SIGKILL, as the kernel does when memory runs out"]}),
        ("os.kill(os.getpid(), 11)", {"fault": ["crash", "the decoder's process died of SIGSEGV"]}),
        ("os.kill(os.getpid(), 14)", {"fault": ["hang", "the decoder gave no frame for 0.1 s"]}),
        ("print('{\"resu', flush=True); os.kill(os.getpid(), 11)", {"fault": ["crash", "SIGSEGV"]}),
        ("os._exit(3)", {"fault": ["crash", "the decoder ended its process with status 3"]}),
        ('print(\'{"result": "fine"}\', flush=True); os._exit(0)', {"result": "fine"}),
    ],
)
def test_the_end_of_a_child_says_what_happened(
    monkeypatch: pytest.MonkeyPatch, end: str, answer: dict[str, object]
) -> None:
    monkeypatch.setattr(isolate, "_CHILD", f"import os; print('ready', flush=True); {end}")
    said = json.loads(isolate.ask_child(dataclasses.asdict(RUN), "probe", "", "", "{}"))
    assert str(answer.get("fault", ["", "fine"])[1]) in str(said)  # pyright: ignore[reportIndexIssue]
    assert list(said) == list(answer)


CHILD = """
import os, time
from pipeline import isolate, shard
isolate.STORAGE_SECONDS = 0.2
def task(*_):
    {task}
shard.ALONE["probe"] = task
isolate.main()
"""


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("with isolate.decoding(), isolate.storage(): time.sleep(60)", {"error": "the storage did not answer for 9 s"}),
        (
            "with isolate.decoding():\n        with isolate.storage(): pass\n        time.sleep(60)",
            {"fault": ["hang", "the decoder gave no frame for 0.1 s"]},
        ),
    ],
)
def test_storage_that_hangs_is_not_blamed_on_the_video(
    monkeypatch: pytest.MonkeyPatch, task: str, answer: dict[str, object]
) -> None:
    monkeypatch.setattr(isolate, "STORAGE_SECONDS", 9.0)
    monkeypatch.setattr(isolate, "_CHILD", CHILD.format(task=task))
    assert json.loads(isolate.ask_child(dataclasses.asdict(RUN), "probe", "", "", "{}")) == answer


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    run = dataclasses.asdict(dataclasses.replace(RUN, stall_seconds=600))
    task = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"from pipeline import isolate\nisolate._CHILD = {CHILD.format(task=task)!r}\n"
    parent += f"isolate.ask_child({run!r}, 'probe', '', '', '{{}}')"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    status, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"), time.monotonic() + 30
    with contextlib.suppress(OSError):  # it is gone, or a zombie where nobody collects orphans
        while status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_child_that_cannot_start_is_not_blamed_on_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_CHILD", "import missing_package")
    with pytest.raises(RuntimeError, match=r"ended with status 1: .*No module named 'missing_package'"):
        isolate.ask_child(dataclasses.asdict(RUN), "probe", "", "", "{}")


def test_a_child_whose_clock_fails_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_CHILD", "import time; print('ready', flush=True); time.sleep(600)")
    monkeypatch.setattr(isolate, "CHILD_SECONDS", 1.0)
    assert json.loads(isolate.ask_child(dataclasses.asdict(RUN), "probe", "", "", "{}"))["fault"][0] == "hang"


def test_a_child_finds_the_same_packages_and_not_those_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('wrong')")
    monkeypatch.chdir(tmp_path)
    where = "import pipeline, json; print('ready', flush=True); print(json.dumps({'result': pipeline.__file__}))"
    monkeypatch.setattr(isolate, "_CHILD", where)
    import pipeline

    answer = json.loads(isolate.ask_child(dataclasses.asdict(RUN), "probe", "", "", "{}"))
    assert answer == {"result": pipeline.__file__}
