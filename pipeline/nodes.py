"""What a node of a cluster finds wrong with itself, and who may give the cluster orders; for the doctor."""

import http.client
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import store, trial

FULL = 0.95
"""Share of a disk beyond which Ray makes no more objects there."""
PROBE_SECONDS = 5.0
"""How long a port may take to answer."""
GPU_SECONDS = 40.0
"""How long torch may take to count GPUs; less than the doctor waits for a node."""
_COUNT_GPUS = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"


def report(out: str, read: Sequence[str], gpus: float, folder: str) -> dict[str, Any]:
    """Look at the machine that this runs on; the body of a Ray task.

    Args:
        out: where results are to be written.
        read: what is to be read: folders, files and URLs.
        gpus: GPUs that Ray counts here.
        folder: where Ray keeps its objects and logs here.

    Returns:
        ``faults``, each with what to do, and the ``time`` of its clock.
    """
    return {"faults": [*_folder_faults(out, read), *_disk_faults(folder), *_gpu_faults(gpus)], "time": time.time()}


def answers_without_token(address: str, port: int, dashboard: bool) -> bool | None:
    """Whether the dashboard, else Ray's control store, answers somebody who has no token; None if nothing says so."""
    return _dashboard_answers(address, port) if dashboard else _control_store_answers(address, port)


def _folder_faults(out: str, read: Sequence[str]) -> Iterator[str]:
    remedy = "mount it there for this user, or use s3://"
    credentials = "give the node its credentials (an instance's role, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    credentials += "where `ray start` runs) and the endpoint"
    folder = out
    while not store.is_url(folder) and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    probe = store.join(folder, f".objdyn-probe-{uuid.uuid4().hex}")
    try:
        try:
            store.publish(probe, b"probe")
        finally:
            store.remove(probe)
    except Exception as error:  # of any type: object storage has its own
        place = folder if folder == out else f"{folder}, for {out}"
        yield f"cannot write {place} ({trial.one_line(error)}): {credentials if store.is_url(out) else remedy}"
    for path in read:
        try:
            if store.is_url(path):
                store.list_names(path)
            elif os.path.isdir(path):
                os.listdir(path)
            else:
                store.open_local(path).close()
        except Exception as error:
            yield f"cannot read {path} ({trial.one_line(error)}): {credentials if store.is_url(path) else remedy}"


def _disk_faults(folder: str) -> Iterator[str]:
    if not os.path.isdir(folder):
        return
    disk = shutil.disk_usage(folder)
    if disk.total - disk.free > FULL * disk.total:
        text = f"has {disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free at {folder}, where Ray keeps its objects: "
        yield f"{text}free some, or start Ray with another --temp-dir"


def _gpu_faults(gpus: float) -> Iterator[str]:
    if not gpus:
        return
    # In a process of its own: Ray hides the GPUs from a task that asked for none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", _COUNT_GPUS]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        yield f"torch has not counted its GPUs within {GPU_SECONDS:g} s: look at nvidia-smi and the driver there"
        return
    seen, _, build = done.stdout.strip().partition(" ")
    if not seen.isdigit() or int(seen) < gpus:
        text = f"is said to have {gpus:g} GPUs, but torch sees {seen or 'none'}: "
        text += "install torch's CUDA build there" if build == "None" else "look at nvidia-smi and the driver there"
        yield f"{text}, or start Ray with the true --num-gpus"


def _dashboard_answers(address: str, port: int) -> bool | None:
    # Not by urllib: it would ask a proxy from the environment instead of the port.
    connection = http.client.HTTPConnection(address, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/api/version")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    else:
        refused = status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
        return True if status == http.HTTPStatus.OK else False if refused else None
    finally:
        connection.close()


def _control_store_answers(address: str, port: int) -> bool | None:
    import grpc

    place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    with grpc.insecure_channel(place, options=(("grpc.enable_http_proxy", 0),)) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            ask(b"", timeout=PROBE_SECONDS)
            return True
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            return False if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED) else None
