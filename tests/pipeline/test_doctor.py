import dataclasses
import errno
import http.server
import importlib.metadata
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cluster, doctor, failpoints, machine, nodes, store, trial
from pipeline.config import DoctorRun, ShardRun, with_overrides
from pipeline.doctor import Case, Finding
from pipeline.presets import PRESETS
from pipeline.quickstart import write_mp4

Look = Callable[..., list[Finding]]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return doctor._case(DoctorRun(preset="ddlp/debug", out=str(tmp_path)))


@pytest.fixture
def look(case: Case) -> Look:
    """Runs one check, on the case with changes."""
    return lambda check, **changes: list(doctor.examine(check, case._replace(**changes)))


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that are found instead of the installed ones; None is not installed."""
    fake: dict[str, str | None] = {"torchvision": None}
    installed = importlib.metadata.version

    def version(name: str) -> str:
        found = fake.get(name, "")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return fake


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def write_videos(folder: Path, names: list[str], frames: int = 30) -> None:
    folder.mkdir()
    images = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 5, (frames, 32, 48, 3)).copy()
    for name in names:
        write_mp4(str(folder / name), images, 25.0)


def test_every_finding_is_a_line_and_a_failure_raises_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_first(case: Case) -> Iterator[Finding]:
        yield Finding("ok", "first", "in\ntwo lines")
        yield Finding("warn", "first", "odd")

    def check_the_second(case: Case) -> Iterator[Finding]:
        yield Finding("FAIL", "second", "bad; mend it")
        raise RuntimeError("not foreseen")

    monkeypatch.setattr(doctor, "CHECKS", (check_first, check_the_second))
    with pytest.raises(ValueError, match="1 ok, 1 warnings, 2 failures: second, the second; each FAIL line"):
        doctor.doctor(DoctorRun(out=str(tmp_path)))
    assert capsys.readouterr().out.splitlines() == [
        "ok    first: in two lines",
        "warn  first: odd",
        "FAIL  second: bad; mend it",
        "FAIL  the second: RuntimeError: not foreseen",
    ]


def test_all_well_is_summed_up_with_what_was_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python,))
    summary = doctor.doctor(DoctorRun(out=str(tmp_path), data="sim:balls-interaction"))
    assert summary == "1 ok, 0 warnings, 0 failures; not looked at because not given: --source"


def test_unknown_preset_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--preset small is unknown; choose from ddlp/debug, .*ddlp/small"):
        doctor.doctor(DoctorRun(preset="small"))


def test_job_prints_a_line_per_check_and_ends_with_status_1(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = str(tmp_path / "file" / "runs")
    monkeypatch.setattr(sys, "argv", ["jobs/doctor.py", "--no-ray", "--no-train-step", "--out", out])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs" / "doctor.py"), run_name="__main__")
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert f"FAIL  out: {out} cannot be made: {tmp_path}/file is no folder" in printed.out
    assert all(line[:6] in ("ok    ", "warn  ", "FAIL  ") for line in printed.out.splitlines())
    assert {line[:4] for line in printed.out.splitlines() if ": out" not in line} >= {"ok  "}
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert " out;" in printed.err


def test_job_without_what_the_command_line_needs_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setattr(sys, "argv", ["jobs/doctor.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs" / "doctor.py"), run_name="__main__")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tyro" in error
    assert "make setup" in error


def test_installed_packages_fit(look: Look, versions: dict[str, str | None]) -> None:
    (finding,) = look(doctor.check_packages)
    assert finding.level == "ok"
    assert "ray 2.60.0" in finding.text


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("ray", "2.9.0", "ray is 2.9.0, but ==2.60.0 is needed"),
        ("torch", "2.4.1+cu124", "torch is 2.4.1+cu124, but <2.14,>=2.11 is needed"),
        ("av", None, "av is not installed"),
        ("aiohttp", None, "aiohttp is not installed"),  # of ray's extra "default"
    ],
)
def test_package_that_does_not_fit_is_named(
    name: str, found: str | None, message: str, look: Look, versions: dict[str, str | None]
) -> None:
    versions[name] = found
    (finding,) = look(doctor.check_packages)
    assert finding.level == "FAIL"
    assert finding.text.startswith(f"{message}; run `make setup`")


def test_torchvision_is_warned_of(look: Look, versions: dict[str, str | None]) -> None:
    versions["torchvision"] = "0.28.0"
    assert levels(look(doctor.check_packages)) == ["ok", "warn"]


def test_old_python_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(look(doctor.check_python)) == ["ok"]
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.14")
    (finding,) = look(doctor.check_python)
    assert finding.level == "FAIL"
    assert "3.10.14" in finding.text
    assert ">=3.11 is needed" in finding.text


def test_code_that_does_not_import_is_a_failure(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(look(doctor.check_imports)) == ["ok"]
    monkeypatch.setattr(doctor, "STAGES", ("no_such_stage",))
    (finding,) = look(doctor.check_imports)
    assert finding.level == "FAIL"
    assert "no_such_stage" in finding.text


def test_bf16_without_a_gpu_is_a_warning(look: Look, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "FAIL" not in levels(look(doctor.check_torch))
    assert "warn" in levels(look(doctor.check_torch, training=dataclasses.replace(case.training, precision="bf16")))


def test_container_with_fewer_cores_than_the_machine_is_warned_of(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "200000 100000"}
    monkeypatch.setattr(machine, "read_line", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (finding,) = look(doctor.check_machine)
    assert finding.level == "warn"
    assert "--threads 2" in finding.text
    for text in ("max 100000", ""):
        files["/sys/fs/cgroup/cpu.max"] = text
        assert machine.usable_cores() == 64
    files |= {"/sys/fs/cgroup/cpu.max": "", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000"}
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert machine.usable_cores() == 1


def test_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 32 kB\nMemAvailable:   1000000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000\n",
        "/sys/fs/cgroup/memory.current": "4000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 300000\n",
    }
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(path, ""))
    assert machine.available_memory() == 1_300_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.available_memory() == 1_024_000_000


def test_planted_faults_are_warned_of(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.check_failpoints) == []
    monkeypatch.setenv(failpoints.VARIABLE, "publish=kill")
    assert levels(look(doctor.check_failpoints)) == ["warn"]


@pytest.mark.parametrize(
    ("mode", "address", "token", "level", "words"),
    [
        (None, None, False, "warn", "RAY_AUTH_MODE is unset: .* would take no authentication"),
        (None, None, True, "warn", "`ray start` would take token, since .* exists"),
        ("disabled", None, False, "ok", "private Ray listens on the loopback"),
        ("disabled", "127.0.0.1:6379", False, "ok", "cluster at 127.0.0.1"),
        ("disabled", "192.0.2.7:6379", False, "FAIL", "192.0.2.7: whoever reaches it runs code there"),
        ("disabled", "ray://[2001:db8::7]:10001", False, "FAIL", "2001:db8::7: whoever"),
        (None, "192.0.2.7:6379", True, "FAIL", "192.0.2.7: whoever"),
        ("token", "192.0.2.7:6379", True, "ok", "there is one"),
        ("token", None, False, "FAIL", "missing: ray get-auth-token --generate"),
        ("off", None, False, "FAIL", "RAY_AUTH_MODE is off, which Ray does not know"),
    ],
)
def test_authentication(
    mode: str | None,
    address: str | None,
    token: bool,
    level: str,
    words: str,
    look: Look,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_ADDRESS", address)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").touch(0o600)
    (finding,) = look(doctor.check_ray_authentication)
    assert finding.level == level
    assert re.search(words, finding.text), finding.text


def test_token_that_others_can_read_is_warned_of(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    fine, wide = look(doctor.check_ray_authentication)
    assert (fine.level, wide.level) == ("ok", "warn")
    assert f"mode 0644, so others can read the token: chmod 600 {tmp_path}/token" in wide.text


def test_own_address_without_authentication_is_a_failure(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7:6379")
    monkeypatch.setattr(machine, "is_own_address", lambda host: host == "192.0.2.7")
    (finding,) = (each for each in look(doctor.check_ray_authentication) if "192.0.2.7" in each.text)
    assert finding.level == "FAIL"
    assert "--node-ip-address=127.0.0.1" in finding.text


def test_private_ray_on_every_interface_is_a_failure(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.check_ray_network) == []
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    assert levels(look(doctor.check_ray_network)) == ["FAIL"]


def test_small_shared_memory_is_warned_of(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "OBJECT_STORE_BYTES", 1)
    assert levels(look(doctor.check_shared_memory)) == ["ok"]
    monkeypatch.setattr(cluster, "OBJECT_STORE_BYTES", 1 << 60)
    assert levels(look(doctor.check_shared_memory)) == ["warn"]


def test_another_ray_on_the_machine_is_named(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    there: list[tuple[int, str]] = []
    listening = {doctor.AGENT_PORT: False}
    monkeypatch.setattr(machine, "raylets", lambda: iter(there))
    monkeypatch.setattr(machine, "listens", lambda host, port: listening.get(port, False))
    assert levels(look(doctor.check_other_rays)) == ["ok"]
    there.append((4321, "/tmp/old"))
    listening[doctor.AGENT_PORT] = True
    (finding,) = look(doctor.check_other_rays)
    assert finding.level == "warn"
    assert "process 4321 in /tmp/old" in finding.text
    assert "'No available agent'" in finding.text
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert levels(look(doctor.check_other_rays)) == ["ok"]  # the cluster's own
    there.append((4322, "/tmp/older"))
    assert levels(look(doctor.check_other_rays)) == ["warn"]


def test_note_of_a_cluster_that_is_gone_is_found(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(machine, "raylets", lambda: iter(()))
    monkeypatch.setattr(machine, "listens", lambda host, port: False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert "10.0.0.1:6379 is gone" in look(doctor.check_other_rays)[1].text


def test_nodes_with_other_software_are_named(
    ray_local: None, look: Look, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    (finding,) = look(doctor.check_private_ray)
    assert finding.level == "ok"
    assert ray.is_initialized()  # it was not the doctor's to stop

    (node,) = ray.nodes()
    monkeypatch.setattr(cluster, "is_joined", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [node, {**node, "Alive": False}])
    assert levels(look(doctor.check_nodes)) == ["ok"]
    monkeypatch.setattr(doctor, "_code_digest", lambda: "changed")
    here = doctor.node_facts(doctor.tiny_video())
    first, last = look(doctor.check_nodes)
    assert (first.level, last.level) == ("FAIL", "ok")
    assert re.fullmatch(r"127\.0\.0\.1 has code \w{12} instead of changed; install the same.*", first.text)

    def broken(*_: object) -> dict[str, Any]:
        raise ImportError("no module named objdyn")

    monkeypatch.setattr(doctor, "node_report", broken)
    first, last = look(doctor.check_nodes)
    assert (first.level, last.level) == ("FAIL", "ok")
    assert first.text.startswith("127.0.0.1 cannot run our code (ImportError: no module named objdyn)")

    def late(*_: object) -> dict[str, Any]:
        return {"software": here, "faults": ["cannot write /data: mount it there"], "time": time.time() + 1000}

    monkeypatch.setattr(doctor, "node_report", late)
    fault, skew, last = look(doctor.check_nodes)
    assert (fault.level, skew.level, last.level) == ("FAIL", "warn", "ok")
    assert fault.text == "127.0.0.1 cannot write /data: mount it there"
    assert re.search(r"the clock of 127\.0\.0\.1 is off by 16\.\d min or more", skew.text), skew.text


def test_cluster_that_answers_without_a_token_is_a_failure(
    ray_local: None, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    assert look(doctor.check_open_cluster) == []
    monkeypatch.setattr(cluster, "is_joined", lambda: True)
    assert levels(look(doctor.check_open_cluster)) == ["ok"]  # it listens on the loopback interface
    monkeypatch.setattr(machine, "is_loopback", lambda host: False)
    (finding,) = look(doctor.check_open_cluster)
    assert finding.level == "FAIL"
    host, port = ray.get_runtime_context().gcs_address.split(":")
    assert f"the control store at {host}:{port} and the dashboard at {host}:" in finding.text
    for answer, level in ((False, "ok"), (None, "warn")):
        monkeypatch.setattr(nodes, "answers_without_token", lambda *args, answer=answer, **options: answer)
        assert levels(look(doctor.check_open_cluster)) == [level]


@pytest.mark.parametrize(("status", "answers"), [(200, True), (401, False), (403, False), (502, None)])
def test_dashboard_that_wants_a_token_is_told_from_one_that_does_not(status: int, answers: bool | None) -> None:
    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.headers["Authorization"] is None else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.handle_request).start()
        assert nodes.answers_without_token("127.0.0.1", server.server_port, dashboard=True) is answers
    for dashboard in (True, False):  # nobody is there
        assert nodes.answers_without_token("127.0.0.1", server.server_port, dashboard=dashboard) is None


def test_node_says_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    fine = nodes.report(str(tmp_path / "runs" / "new"), [str(tmp_path / "data")], 0, str(tmp_path))
    assert fine["faults"] == []
    assert time.time() - 60 < fine["time"] <= time.time()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 * 10**9, 96 * 10**9, 4 * 10**9))
    monkeypatch.setattr(nodes, "_COUNT_GPUS", "print(1, '12.8')")
    write, read, disk, gpus = nodes.report("/proc/objdyn", [str(tmp_path / "absent")], 2, str(tmp_path))["faults"]
    assert write.startswith("cannot write /proc, for /proc/objdyn (")
    assert read.startswith(f"cannot read {tmp_path}/absent (")
    assert disk.startswith(f"has 4.0 of 100.0 GB free at {tmp_path}")
    assert gpus.startswith("is said to have 2 GPUs, but torch sees 1: look at nvidia-smi")
    monkeypatch.setattr(nodes, "_COUNT_GPUS", "print(0, None)")
    assert "sees 0: install torch's CUDA build" in nodes.report(str(tmp_path), [], 1, "")["faults"][0]
    monkeypatch.setattr(nodes, "_COUNT_GPUS", "print(2, '12.8')")
    assert nodes.report(str(tmp_path), [], 2, "")["faults"] == []


def test_node_that_the_storage_refuses_says_so(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes.report(f"{s3_folder}/out", [f"{s3_folder}/data"], 0, "")["faults"] == []
    (write,) = nodes.report("s3://no-such-bucket/out", [], 0, "")["faults"]
    assert write.startswith("cannot write s3://no-such-bucket/out (")
    assert "give the node its credentials" in write

    def refuse(path: str) -> list[str]:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store, "list_names", refuse)
    (read,) = nodes.report(f"{s3_folder}/out", [f"{s3_folder}/data"], 0, "")["faults"]
    assert read.startswith(f"cannot read {s3_folder}/data (Access Denied): give the node")


def test_folder_is_tried_and_left_as_it_was(look: Look, tmp_path: Path) -> None:
    assert levels(look(doctor.check_out)) == ["ok", "ok"]
    assert levels(look(doctor.check_out, out=str(tmp_path / "not" / "yet"))) == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folders_say_what_to_do(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("/proc/objdyn", str(tmp_path / "link" / "x")):
        (finding,) = look(doctor.check_out, out=out)
        assert finding.level == "FAIL"
        assert "choose another --out" in finding.text

    for number, remedy in [
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.ENOSPC, "free some space"),
    ]:

        def refuse(path: str, data: bytes, number: int = number) -> None:
            raise OSError(number, os.strerror(number), path)

        monkeypatch.setattr(store, "publish", refuse)
        (finding,) = look(doctor.check_out)
        assert finding.level == "FAIL"
        assert os.strerror(number) in finding.text
        assert remedy in finding.text


def test_file_system_without_hard_links_is_a_failure(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", refuse)
    (finding,) = look(doctor.check_out)
    assert finding.level == "FAIL"
    assert "hard links" in finding.text


def test_object_storage_is_tried_and_left_as_it_was(look: Look, s3_folder: str) -> None:
    assert levels(look(doctor.check_out, out=s3_folder)) == ["ok", "ok"]
    assert store.list_names(s3_folder) == []


def test_storage_that_cannot_be_written_says_what_to_do(
    look: Look, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = look(doctor.check_out, out="s3://no-such-bucket/x")
    assert finding.level == "FAIL"
    assert "bucket does not exist" in finding.text

    class Denying(_Storage):
        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **given: Any) -> None:
            raise PermissionError("Access Denied")

    monkeypatch.setattr(store, "filesystem", Denying)
    (finding,) = look(doctor.check_out, out=s3_folder)
    assert finding.level == "FAIL"
    assert "Access Denied" in finding.text
    assert "AWS_ACCESS_KEY_ID" in finding.text


@pytest.mark.parametrize("known", ["-alone", "nowhere"])
def test_storage_without_create_if_absent_is_a_failure(
    known: str, look: Look, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(_Storage):
        """Ignores the condition; or looks before it writes, which fails where several write at once."""

        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **given: Any) -> None:
            self.real.pipe_file(path, data, mode=mode if path.endswith(known) else "overwrite", **given)

    monkeypatch.setattr(store, "filesystem", Forgetful)
    assert not store.supports_create(s3_folder)
    writable, create = look(doctor.check_out, out=s3_folder)
    assert (writable.level, create.level) == ("ok", "FAIL")
    assert "If-None-Match" in create.text
    assert store.list_names(s3_folder) == []


class _Storage:
    """The real storage, to be changed in one method."""

    def __init__(self) -> None:
        import s3fs

        self.real = s3fs.S3FileSystem(use_listings_cache=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_every_decoder_is_here(look: Look) -> None:
    for check in (
        doctor.check_video_decoders,
        doctor.check_image_decoders,
        doctor.check_stored_frames,
        doctor.check_hdf5,
    ):
        assert levels(look(check)) == ["ok"], check.__name__


def test_missing_decoder_names_the_format(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    import av
    from av.codec.codec import UnknownCodecError

    codec = av.Codec

    def without(name: str, mode: Any = "r") -> Any:
        if (name, mode) in (("h264", "r"), ("hevc", "r")):
            raise UnknownCodecError(name)
        return codec(name, mode)

    monkeypatch.setattr(av, "Codec", without)
    missing, rare, fine = look(doctor.check_video_decoders)
    assert (missing.level, rare.level, fine.level) == ("FAIL", "warn", "ok")
    assert missing.text.startswith("H.264 (mp4, mov, mkv) cannot be read (FFmpeg has no decoder h264); pip install")
    assert rare.text.startswith("H.265")


def test_decoder_that_gives_other_pixels_is_a_failure(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    from objdyn import clips

    monkeypatch.setattr(clips, "read_video", lambda file: clips.Video(255 - doctor._ramp(), 10.0))
    assert "FAIL" in levels(look(doctor.check_video_decoders))


def test_missing_image_libraries_are_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    from objdyn import clips

    encode = clips.to_sample

    def without_webp(clip: clips.Clip, codec: str = "zstd") -> dict[str, bytes]:
        if codec == "webp-strip":
            raise KeyError("WEBP")
        return encode(clip, codec)

    monkeypatch.setattr(clips, "to_sample", without_webp)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for check, word in ((doctor.check_stored_frames, "webp-strip"), (doctor.check_hdf5, "h5py")):
        (finding,) = look(check)
        assert finding.level == "FAIL"
        assert word in finding.text


def test_sample_of_videos_is_decoded_in_a_process_that_may_die(
    look: Look, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "videos"
    write_videos(source, ["a.mp4", "b.mp4", "z-poison.mp4"])
    (source / "text.mp4").write_text("no video")
    monkeypatch.setenv(failpoints.VARIABLE, "decode:probe z-poison=kill")
    run = dataclasses.replace(case.run, frames=5)
    found, sharding = look(doctor.check_source, source=str(source), run=run)
    assert found.level == "warn"
    assert found.text.startswith(
        "2 of 4 sampled videos decode; there are 4 videos and 0 other files: 48 wide, 32 high, 30"
    )
    assert "text.mp4: " in found.text
    assert "z-poison.mp4: its process was killed by signal 9" in found.text
    assert "--frames 5 --stride 1 --size 64 writes about 12 clips" in sharding.text  # 2 good of 4, 6 clips each


def in_process(target: trial.Trial, *arguments: Any, seconds: float) -> Iterator[dict[str, Any]]:
    yield from target(*arguments)


def test_source_without_a_readable_video_is_a_failure(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "in_child", in_process)
    source = tmp_path / "videos"
    source.mkdir()
    (finding,) = look(doctor.check_source, source=str(source))
    assert finding.level == "FAIL"
    assert "empty" in finding.text
    (source / "text.mp4").write_text("no video")
    (finding,) = look(doctor.check_source, source=str(source))
    assert finding.level == "FAIL"
    assert finding.text.startswith("0 of 1 sampled videos decode")


def test_sample_is_spread_over_the_source_and_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "in_child", in_process)
    source = tmp_path / "videos"
    write_videos(source, [f"{number:02d}.mp4" for number in range(15)], frames=6)
    run = ShardRun(source=str(source), out=str(tmp_path), frames=5)
    sample = trial.sample_source(run, 20.0)
    assert [each["video"] for each in sample.read] == [f"{number:02d}.mp4" for number in range(0, 15, 2)]
    assert (sample.files, sample.videos, sample.unfinished) == (15, 15.0, "")

    def late(target: trial.Trial, *arguments: Any, seconds: float) -> Iterator[dict[str, Any]]:
        yield {"begin": "00.mp4", "file": 0}
        raise TimeoutError("it was not done after 20 s")

    monkeypatch.setattr(trial, "in_child", late)
    assert trial.sample_source(run, 20.0).unfinished == "00.mp4"


def test_a_reader_that_fails_or_stalls_costs_the_sample_one_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from objdyn.datasets import LAYOUTS

    monkeypatch.setattr(trial, "in_child", in_process)
    write_videos(tmp_path / "videos", ["a.mp4", "b.mp4"], frames=6)
    layout = LAYOUTS["videos"]
    clocks = []

    def probe(video: Any, *arguments: Any) -> Any:
        clocks.append(signal.getitimer(signal.ITIMER_REAL)[0] > 0)
        if video.source == "a.mp4":
            raise KeyError("missing")
        return layout.probe(video, *arguments)

    monkeypatch.setitem(LAYOUTS, "videos", layout._replace(probe=probe))
    sample = trial.sample_source(ShardRun(source=str(tmp_path / "videos"), out=str(tmp_path), frames=5), 20.0)
    assert [each["video"] for each in sample.read] == ["b.mp4"]
    assert (sample.faults, clocks) == (["a.mp4: KeyError: 'missing'"], [True, True])


def test_dataset_larger_than_the_disk_is_a_failure(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "in_child", in_process)
    monkeypatch.setattr(machine, "free_disk", lambda path: 10)
    write_videos(tmp_path / "videos", ["a.mp4"])
    assert levels(look(doctor.check_source, source=str(tmp_path / "videos"))) == ["ok", "FAIL"]


def test_dataset_is_put_through_the_model(look: Look) -> None:
    assert levels(look(doctor.check_data, data="sim:balls-interaction")) == ["ok", "ok"]
    wrong = doctor._case(DoctorRun(preset="ddlp/traffic", out="/tmp"))
    read, refused = look(doctor.check_data, data="sim:balls-interaction", training=wrong.training)
    assert (read.level, refused.level) == ("ok", "FAIL")
    assert "128" in refused.text


def test_missing_dataset_is_a_failure(look: Look, tmp_path: Path) -> None:
    (finding,) = look(doctor.check_data, data=str(tmp_path / "nothing"))
    assert finding.level == "FAIL"
    assert "nothing" in finding.text


@pytest.fixture
def training(case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(trial, "in_child", in_process)
    return dataclasses.replace(case.training, threads=1)  # the session's; more would be slower for all


def test_preset_is_measured_by_training_steps(look: Look, training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list(trial.train_steps(training))
    monkeypatch.setattr(trial, "in_child", lambda *arguments, seconds: iter(measured))
    memory, hours, disk = look(doctor.check_training, training=training)
    assert [memory.level, hours.level, disk.level] == ["ok"] * 3
    assert "20 steps of 4 clips" in hours.text
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    monkeypatch.setattr(machine, "free_disk", lambda path: 1000)
    memory, hours, disk = look(doctor.check_training, training=training)
    assert [memory.level, hours.level, disk.level] == ["FAIL", "ok", "FAIL"]
    assert "1 kB are free" in memory.text


@pytest.mark.parametrize("family", ["ssm", "ed_lstm"])
def test_a_model_of_binary_frames_is_tried_on_such_frames(family: str) -> None:
    run = with_overrides(PRESETS[family]["debug"], {"model.threshold": None, "threads": 1, "device": "cpu"})
    *steps, _ = [answer for answer in trial.train_steps(run) if "begin" not in answer]
    assert [step["clips"] for step in steps] == [1, 2]


def test_estimates_follow_from_what_was_measured(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 3_000_000_000)
    steps = [
        {"clips": 1, "seconds": 1.0, "bytes": 500_000_000, "gpu": ""},
        {"clips": 2, "seconds": 1.5, "bytes": 600_000_000, "gpu": ""},
    ]
    balls = doctor._case(DoctorRun(preset="ddlp/balls-released", out=str(tmp_path)))
    memory = doctor._memory(balls, balls.training, steps)
    assert memory.level == "FAIL"  # 0.5 GB and 31 times 0.1 GB, and two micro-batches read ahead
    assert "needs about 3.61 GB for micro-batches of 32 clips of 11 frames" in memory.text
    hours = doctor._time(balls, balls.training, steps[-1])
    assert hours.level == "warn"
    assert "2,109,300 steps of 32 clips at 24 s take 586 d" in hours.text
    gpu = [{**step, "gpu": "a GPU", "free": 80_000_000_000} for step in steps]
    assert "80 GB are free on a GPU" in doctor._memory(balls, balls.training, gpu).text
    disk = doctor._disk(case, case.training, {"checkpoint": 2_000_000, "line": 1000.0})
    assert "10 MB: up to 5 checkpoints of 2 MB" in disk.text  # keep_last=3, the best, the next; and 6 lines


def test_step_that_is_killed_for_its_memory_is_a_failure(
    look: Look, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(target: trial.Trial, *arguments: Any, seconds: float) -> Iterator[dict[str, Any]]:
        yield {"begin": 2}
        raise ChildProcessError("its process was killed by signal 9")

    monkeypatch.setattr(trial, "in_child", killed)
    (finding,) = look(doctor.check_training, training=training)
    assert finding.level == "FAIL"
    assert "on 2 clips of 6 frames failed: its process was killed by signal 9" in finding.text
