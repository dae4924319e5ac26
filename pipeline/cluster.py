"""Ray: start a private one or join the cluster that is there, and make sure that its nodes see the same folders."""

import atexit
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence

from pipeline import stop, store

OBJECT_STORE_BYTES = 512 << 20
"""Shared memory of a private Ray. What passes through it is small: plans in, manifest rows out."""
PROBE_SECONDS = 60.0
"""How long a node may take to read a probe file."""

_OUR_VARIABLES = (store.SETTINGS, store.PROVED)
_ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS", *_OUR_VARIABLES
)  # fmt: skip
"""Credentials are none of them: Ray shows the variables of a job to everybody who may look at the cluster."""


def connect(num_cpus: int | None = None) -> None:
    """Connect to Ray, once per process.

    Inside a submitted job, or with ``RAY_ADDRESS`` set, this joins that cluster and ``num_cpus`` has no meaning. Else
    it starts a Ray of its own on this machine, with ``num_cpus`` slots (``None``: as many as there are cores), without
    dashboard, in a temporary folder that goes with it.

    Ray 2.60 changes its authentication by what it finds in the home directory when ``RAY_AUTH_MODE`` is unset, so a
    private Ray gets ``disabled`` explicitly, and listens on the loopback interface only.

    Raises:
        ValueError: the cluster cannot be joined.
        RuntimeError: ray was imported before the first call, too late to keep a private Ray off the network.
    """
    joining = is_joined()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default is to run a task that its memory monitor kills again without end. The driver's value counts.
    os.environ.setdefault("RAY_task_oom_retries", "2")
    if not joining:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Else Ray replaces 127.0.0.1 by the machine's address and listens on every interface: without authentication
        # anyone on the network could run code here. The name is Ray's; its effect is the same on Linux.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray  # after the environment is set: it is read on import

    if ray.is_initialized():
        return
    with stop.keep_handler():
        if joining:
            _join()
        else:
            _start(num_cpus)


def is_joined() -> bool:
    """Tell whether ``connect`` joins a cluster that others started, which may grow on demand."""
    return store.in_submitted_job() or bool(os.environ.get("RAY_ADDRESS"))


def require_shared(paths: Sequence[str]) -> None:
    """Check that every node of the cluster sees the same folders; s3:// URLs and a single node need no check.

    The driver writes a probe file into each folder (or its nearest parent that exists) and every node reads it.

    Raises:
        ValueError: a node does not see a folder, or the driver cannot write the probe.
    """
    import ray

    nodes = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    for path in paths:
        if not store.is_url(path):
            _probe(path, nodes)


def _join() -> None:
    import ray
    from ray.exceptions import AuthenticationError

    # A submitted job's workers get their environment from the job, but not what its flags say; another driver's would
    # not know the endpoint.
    names = _OUR_VARIABLES if store.in_submitted_job() else _ENDPOINT_VARIABLES
    given = {name: os.environ[name] for name in names if name in os.environ}
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "auto",
            logging_level=logging.ERROR,
            log_to_driver=False,  # what workers have to say arrives as results and exceptions
            runtime_env={"env_vars": given} if given else None,
        )
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot join the Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS', 'auto')} ({reason}); start it, "
            "or unset RAY_ADDRESS to run on this machine alone; RAY_AUTH_MODE (token or disabled) must be as it is on "
            f"the cluster, here it is {os.environ.get('RAY_AUTH_MODE', 'unset')}"
        ) from error


def _start(num_cpus: int | None) -> None:
    import ray

    private = None
    if "RAY_TMPDIR" not in os.environ:
        # Its own folder, so that the remains of another cluster in /tmp/ray cannot be taken for this one; short,
        # because Ray's socket paths must stay under 108 bytes.
        private = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="objdyn-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    if private is not None:
        atexit.register(_stop, private)
    address = ray.util.get_node_ip_address()
    if os.environ["RAY_AUTH_MODE"] == "disabled" and address != "127.0.0.1":
        ray.shutdown()
        raise RuntimeError(
            f"Ray would listen on {address} without authentication; call connect() before anything imports ray, or set "
            "RAY_AUTH_MODE=token"
        )


def _stop(folder: str) -> None:
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _probe(path: str, nodes: Sequence[tuple[str, str]]) -> None:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    probe, token = os.path.join(folder, f".objdyn-probe-{uuid.uuid4().hex}"), uuid.uuid4().hex
    try:
        with open(probe, "w") as file:
            file.write(token)
    except OSError as error:
        raise ValueError(
            f"cannot write a probe file into {folder} ({error.strerror}), so it is unknown whether the cluster's "
            f"{len(nodes)} nodes share it; make it writable, or use an s3:// URL"
        ) from error
    try:
        read = ray.remote(num_cpus=0, max_retries=0)(_read_probe)
        answers = [
            read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probe)
            for node, _ in nodes
        ]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=PROBE_SECONDS)
        blind = []
        for (_, address), answer in zip(nodes, answers, strict=True):
            try:
                if answer not in ready or ray.get(answer) != token:
                    blind.append(address)
            except RayError as error:
                blind.append(f"{address} ({str(error).strip().splitlines()[-1]})")
    finally:
        os.unlink(probe)
    if blind:
        raise ValueError(
            f"{path} is not shared by all nodes: {', '.join(blind)} cannot read what this machine writes into "
            f"{folder}; use a folder that every node mounts, or an s3:// URL"
        )


def _read_probe(path: str) -> str | None:
    for _ in range(10):  # a network file system may show a new file late
        try:
            with open(path) as file:
                return file.read()
        except OSError:
            time.sleep(0.5)
    return None
