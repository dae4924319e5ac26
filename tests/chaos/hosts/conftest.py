"""Several real hosts on one machine: each a set of Linux namespaces with its own address, processes and /tmp.

    the room                 a network namespace with a bridge, 10.77.0.1
      head   10.77.0.2       Ray's head, one CPU; drivers run here
      second 10.77.0.3       one CPU
      ...                    what a test adds

A host is a network, process, mount, host name and IPC namespace. Its /tmp and /dev/shm are its own; of this machine's
/tmp it sees only the shared folder, which is the same on all, and what the software lies in. Nothing is named outside
of these namespaces: they go when their first process ends, which it does when the test's end of its pipe closes. So
nothing is left over even by a test run that is killed, and any number of runs do not meet.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
START_SECONDS = 120.0
"""How long a node may take to join."""
JOIN_SECONDS = 600.0
"""How long is tried to start it on a machine that is busy with other things."""
HOST_SCRIPT = """
set -e
hostname "$NAME"
mount --make-rprivate /
for number in $NUMBERS; do eval "exec $number<\\"\\$PLACE_$number\\""; done
mount -t tmpfs -o mode=1777 none /tmp
mount -t tmpfs -o mode=1777 none /dev/shm
for number in $NUMBERS; do
    eval "place=\\"\\$PLACE_$number\\""
    mkdir -p "$place"
    mount --no-canonicalize --bind "/proc/self/fd/$number" "$place"
    eval "exec $number<&-"
done
mkdir -p /tmp/home/.ray
ip link set lo up
echo ready
exec cat
"""

# Runs on the head: waits until so many nodes are alive, and prints their addresses.
NODES_SCRIPT = """
import sys, time, ray
wanted, end = int(sys.argv[1]), time.monotonic() + 100
while True:
    try:
        ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
        break
    except (ConnectionError, RuntimeError) as error:  # Ray is not up yet
        if time.monotonic() > end:
            sys.exit(str(error))
        time.sleep(0.5)
while True:
    seen = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    if len(seen) == wanted:
        print(*seen)
        sys.exit()
    if time.monotonic() > end:
        sys.exit(f"wanted {wanted} nodes, at last saw {seen}")
    time.sleep(0.2)
"""


def _nodes_words(wanted: int) -> list[str]:
    return [sys.executable, "-c", NODES_SCRIPT, str(wanted)]


def finish(program: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> tuple[int, str]:
    """Wait for a program that writes into a log; returns its exit status and the log.

    Raises:
        TimeoutError: it does not end; the message has the log.
    """
    try:
        status = program.wait(seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{program.args} ran longer than {seconds} s: {log.read_text()}") from None
    return status, log.read_text()


class Host:
    """A host of the room; see ``Room.add``."""

    def __init__(self, name: str, address: str, places: Sequence[Path], environment: dict[str, str]) -> None:
        self.name, self.address = name, address
        self.environment = environment | {"HOME": "/tmp/home"}
        numbers = range(3, 3 + len(places))
        given = {f"PLACE_{number}": str(place) for number, place in zip(numbers, places, strict=True)}
        self.first = _first_process(
            ["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"],
            HOST_SCRIPT,
            {"NAME": name, "NUMBERS": " ".join(map(str, numbers)), **given},
        )
        self.programs: list[subprocess.Popen[bytes]] = []
        self.ray_words: list[str] = []

    def start(self, *words: str | Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program in this host, with what it prints in a file."""
        target = self.first.pid
        enter = ["nsenter", f"--target={target}", "--net", "--mount", "--uts", "--ipc", "--wd=/tmp"]
        enter.append(f"--pid=/proc/{target}/ns/pid_for_children")
        with open(log, "ab") as file:
            program = subprocess.Popen(
                [*enter, *map(str, words)],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.programs.append(program)
        return program

    def run(self, *words: str | Path, log: Path, seconds: float = 120, **environment: str) -> tuple[int, str]:
        """Run a program in this host to its end; returns its exit status and what it printed."""
        log.unlink(missing_ok=True)
        return finish(self.start(*words, log=log, **environment), log, seconds)

    def path(self, path: str | Path) -> Path:
        """Where a file of this host is to be found from outside."""
        return Path(f"/proc/{self.first.pid}/root{path}")

    def processes(self, text: str = "") -> dict[int, str]:
        """Processes of this host whose command line contains a text, by their number outside, with the command line."""
        home = os.readlink(f"/proc/{self.first.pid}/ns/pid_for_children")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == home:
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if text in title:
                        found[int(entry.name)] = title
        return found

    def kill(self, text: str = "") -> int:
        """SIGKILL processes of this host but its first; returns how many."""
        first = {pid for pid, title in self.processes("cat").items() if title.strip() == "cat"}
        killed = 0
        for pid in set(self.processes(text)) - first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    def start_ray(self, log: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start Ray here as an operator would; again with the same words if none are given."""
        self.ray_words = list(words) or self.ray_words
        return self.start(
            BIN / "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address}",
            "--num-cpus=1", "--object-store-memory=100000000", *self.ray_words, log=log, **environment
        )  # fmt: skip

    def close(self) -> None:
        """End every process of this host; its network and mounts go with them."""
        _end(self.first)
        for program in self.programs:  # their insides ended with the first process
            program.kill()
            program.wait()


class Room:
    """Hosts on a bridge, of which the first is Ray's head."""

    ray = f"{NETWORK}.2:6379"
    """Address of the Ray of its hosts, for ``RAY_ADDRESS``."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.hosts: list[Host] = []
        self.places = [
            place
            for place in (REPOSITORY, Path(sys.prefix).resolve(), shared)
            if place.is_relative_to("/tmp") or place.is_relative_to("/dev/shm")
        ]
        self.token = secrets.token_hex(16)
        self.environment = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "LANG": "C.UTF-8",
            "RAY_AUTH_MODE": "token",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            "RAY_worker_niceness": "0",  # not 15: a worker that starves looks like one that is lost
            # at most a dozen seconds instead of tens, and not so few that a busy machine looks dead
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
            **{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MPL"))},
        }
        self.bridge = _first_process(["--fork", "--kill-child"], "echo ready; exec cat", {})
        self._ip("link add bridge type bridge", f"address add {NETWORK}.1/24 dev bridge", "link set bridge up")

    def add(self, name: str, token: bool = True) -> Host:
        """A new host on the bridge; its name is its user's too, who has the token or not."""
        number = len(self.hosts) + 2
        host = Host(name, f"{NETWORK}.{number}", self.places, self.environment)
        self.hosts.append(host)
        self._ip(
            f"link add port{number} type veth peer name eth0 netns {host.first.pid}",
            f"link set port{number} master bridge up",
        )
        for words in (
            f"address add {host.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {NETWORK}.1",
        ):
            _check(["nsenter", f"--target={host.first.pid}", "--net", "ip", *words.split()])
        if token:
            file = host.path("/tmp/home/.ray/auth_token")
            file.write_text(self.token)
            file.chmod(0o600)
        return host

    def wait_for_nodes(self, wanted: int) -> list[str]:
        """Wait until the head counts so many nodes as alive; returns their addresses.

        Raises:
            TimeoutError: it never did.
        """
        log = self.shared / "nodes.log"
        status, text = self.hosts[0].run(*_nodes_words(wanted), log=log, seconds=START_SECONDS, RAY_ADDRESS=self.ray)
        if status:
            raise TimeoutError(text + "".join(path.read_text() for path in self.shared.glob("ray-*.log")))
        return text.split()

    def join(self, host: Host, wanted: int, *words: str, **environment: str) -> None:
        """Start Ray on a host, as ``Host.start_ray`` does, until the cluster counts so many nodes.

        `ray start` gives up after a quarter of a minute in which a busy machine did not get it going: so try again.
        """
        log = self.shared / f"ray-{host.name}.log"
        begin = time.monotonic()
        while True:
            program = host.start_ray(log, *words, **environment)
            asked = host if words[:1] == ("--head",) else self.hosts[0]
            where = {"RAY_ADDRESS": f"{asked.address}:6379"} | environment
            waiting = asked.start(*_nodes_words(wanted), log=self.shared / "join.log", **where)
            while waiting.poll() is None and program.poll() is None:
                time.sleep(0.1)
            if waiting.poll() == 0:
                return
            host.kill()
            if time.monotonic() - begin > JOIN_SECONDS:
                raise TimeoutError(log.read_text())

    def plug(self, host: Host, connected: bool) -> None:
        """Connect a host's cable at the bridge, or pull it."""
        number = host.address.rpartition(".")[2]
        self._ip(f"link set port{number} {'up' if connected else 'down'}")

    finish = staticmethod(finish)

    def close(self) -> None:
        """End all hosts."""
        for host in self.hosts:
            host.close()
        _end(self.bridge)

    def _ip(self, *commands: str) -> None:
        for command in commands:
            _check(["nsenter", f"--target={self.bridge.pid}", "--net", "ip", *command.split()])


def _first_process(namespaces: Sequence[str], script: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    first = subprocess.Popen(
        ["unshare", "--net", *namespaces, "sh", "-c", script],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert first.stdout is not None
    if (said := first.stdout.readline()) != b"ready\n":
        said += first.stdout.read()
        _end(first)
        raise PermissionError(said.decode(errors="replace").strip())
    return first


def _end(first: subprocess.Popen[bytes]) -> None:
    first.kill()
    with first:  # closes the pipes and waits
        pass


def _check(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{shlex.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="package")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Hosts of this test run, none yet."""
    if sys.platform != "linux":
        pytest.skip("hosts on one machine need Linux's network namespaces")
    if missing := [program for program in ("unshare", "nsenter", "ip", "mount") if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)} (Debian's util-linux, iproute2)")
    room = None
    try:
        room = Room(tmp_path_factory.mktemp("shared"))
        room.add("head")
        room.add("second")
    except PermissionError as error:
        if room is not None:
            room.close()
        pytest.skip(f"this kernel or user may not make network namespaces: {error}")
    yield room
    room.close()


@pytest.fixture(scope="package")
def ray_of_two(room: Room) -> Room:
    """A Ray over the first two hosts, one CPU each, that wants the token."""
    head, second = room.hosts[:2]
    room.join(head, 1, "--head", "--port=6379", "--include-dashboard=false")
    room.join(second, 2, f"--address={room.ray}")
    return room


@pytest.fixture
def cluster(ray_of_two: Room) -> Room:
    """The Ray over two hosts with both of them alive."""
    ray_of_two.wait_for_nodes(2)
    return ray_of_two
