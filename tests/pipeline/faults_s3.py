"""Run every stage with all data on object storage that fails, and compare with a run that nothing disturbed.

    python tests/pipeline/faults_s3.py --endpoint http://127.0.0.1:5000      an S3 server that checks no signatures

A proxy between the stages and the server fails (``flaky_s3.py``). Each stage runs as in ``faults.py``, in a process of
its own, with loops in place of Ray. At 1 % and 10 % of the requests, and where the answers to 10 % of the writes are
lost, the stage must end well with the same bytes under every name. At 50 % it may stop with one line that says how
often was tried what; then the same command without faults must make the same bytes.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import faults
import numpy as np
import torch
from flaky_s3 import FAULTS, FlakyS3

from pipeline import checkpoint, extract, s3, shard, store
from pipeline.config import ExtractRun, StorageConfig
from pipeline.loop import CLOCK_FIELDS
from pipeline.quickstart import write_mp4

BUCKET = "chaos-bucket"
CLOCK = re.compile(rf'"({"|".join(sorted(CLOCK_FIELDS))})": [^,}}]+'.encode())
"""What the clock decides in a line of metrics."""
HANG, TIMEOUT = 3.0, 2.0
KINDS = [kind for kind in FAULTS if kind != "lost"]
EXPERIMENTS = {
    "1 %": dict.fromkeys(KINDS, 0.01 / len(KINDS)),
    "10 %": dict.fromkeys(KINDS, 0.1 / len(KINDS)),
    "50 %": dict.fromkeys(KINDS, 0.5 / len(KINDS)),
    "lost": {"lost": 0.1},
}
ATTEMPTS = {"50 %": 4}
"""Fewer tries where some lives are to give up."""


@dataclasses.dataclass
class Count:
    injected: int = 0
    survived: int = 0
    wrong: int = 0
    stopped: int = 0
    """Lives that gave up."""


class Server:
    """The objects behind the proxy, as a client sees them that no fault reaches."""

    def __init__(self, endpoint: str) -> None:
        self.client: Any = boto3.client("s3", endpoint_url=endpoint)
        self.client.create_bucket(Bucket=BUCKET)

    def names(self, folder: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{folder}/")
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def read(self, folder: str) -> dict[str, bytes]:
        """Every object under a folder, but TensorBoard's, with metrics without what the clock decides."""
        found: dict[str, bytes] = {}
        for key in self.names(folder):
            name, data = key.removeprefix(f"{folder}/"), self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            if not name.startswith("tensorboard/"):
                found[name] = CLOCK.sub(b"", data) if name == "metrics.jsonl" else data
        return found

    def clear(self, folder: str) -> None:
        for key in self.names(folder):
            self.client.delete_object(Bucket=BUCKET, Key=key)

    def copy(self, folder: str, other: str) -> None:
        for key in self.names(folder):
            source = {"Bucket": BUCKET, "Key": key}
            self.client.copy_object(Bucket=BUCKET, Key=other + key.removeprefix(folder), CopySource=source)


def stages(server: Server, places: dict[str, str]) -> list[tuple[str, Callable[[], object], str]]:
    """Each stage with its work, and the folder to which its result is copied for the next."""
    with tempfile.TemporaryDirectory() as folder:
        for name, length, tint in (("a.mp4", 6, 60), ("b.mp4", 10, 120)):
            frames = np.full((length, faults.SIZE, faults.SIZE, 3), tint, np.uint8)
            for i in range(length):
                frames[i, 4 + i : 12 + i, 8:16] = 220
            write_mp4(os.path.join(folder, name), frames, 25.0)
            server.client.upload_file(os.path.join(folder, name), BUCKET, f"videos/{name}")
    job = functools.partial(ExtractRun, split="train", context=2, horizon=1, device="cpu")
    run = faults.train_run(faults.ToyConfig(), places["data"])
    return [
        ("shard", lambda: shard.shard(faults.shard_run(places["videos"], places["out"], "train")), "data"),
        ("train", lambda: faults.train(run, places["out"]), "run"),
        (
            "extract",
            lambda: extract.extract(job(checkpoint=places["run"], data=places["data"], out=places["out"])),
            "tables",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--endpoint", required=True, help="URL of the server")
    parser.add_argument("--seed", type=int, default=0, help="where the faults fall")
    parser.add_argument("--repeat", type=int, default=1, help="experiments of each kind and stage")
    parser.add_argument("--json", help="file that gets the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint.code_revision()  # of this moment, for all lives
    faults.without_ray()
    s3.FIRST_WAIT = s3.THROTTLED_WAIT = 0.02
    server = Server(arguments.endpoint)
    places = {name: f"s3://{BUCKET}/{name}" for name in ("videos", "data", "run", "out")}
    problems: list[str] = []
    counts: dict[str, Count] = {}
    start = time.monotonic()

    def live(lab: faults.Laboratory, url: str, work: Callable[[], object], attempts: int = store.ATTEMPTS) -> str:
        def alone() -> None:
            os.environ["AWS_ENDPOINT_URL"] = url
            with store.using(StorageConfig(attempts=attempts, timeout=TIMEOUT)):
                work()

        ended, note = lab.live(alone)
        return f"signal {ended}" if ended else note

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = faults.Laboratory(folder)
        os.mkdir(lab.counts)
        for stage, work, keep in stages(server, places):
            server.clear("out")
            note = live(lab, arguments.endpoint, work)
            assert not note, f"{stage} undisturbed: {note}"
            reference = server.read("out")
            server.copy("out", keep)
            for name, rates in EXPERIMENTS.items():
                count = counts[f"{stage}, {name}"] = Count()
                for repeat in range(arguments.repeat):
                    server.clear("out")
                    seed = f"{arguments.seed}/{stage}/{name}/{repeat}"
                    with FlakyS3(arguments.endpoint, rates, seed=seed, hang=HANG) as proxy:
                        note = live(lab, proxy.url, work, ATTEMPTS.get(name, store.ATTEMPTS))
                    count.injected += proxy.faults
                    problem = ""
                    if note and name in ATTEMPTS:
                        count.stopped += 1
                        if "\n" in note or f"tried {ATTEMPTS[name]} times" not in note or f"s3://{BUCKET}/" not in note:
                            problem = f"it stopped with {note!r}"
                        note = live(lab, arguments.endpoint, work)
                    problem = problem or note
                    if not problem and (now := server.read("out")) != reference:
                        count.wrong += 1
                        differ = [key for key in now.keys() | reference.keys() if now.get(key) != reference.get(key)]
                        problem = f"{', '.join(sorted(differ))} differ in the end"
                    if problem:
                        problems.append(f"{stage}, {name}, repeat {repeat}: {problem}")
                    else:
                        count.survived += proxy.faults
                print(f"{stage + ', ' + name:20} {count}", flush=True)
    print(f"{time.monotonic() - start:.0f} s, seed {arguments.seed}")
    for problem in problems:
        print(f"problem: {problem}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({name: dataclasses.asdict(each) for name, each in counts.items()}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
