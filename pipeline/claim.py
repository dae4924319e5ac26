"""One job at a time in a folder, on a disk, on a shared disk and on s3:// alike; ``store.create`` is all it needs.

    OUT/.claim-00000007      who works here: job, host, process, and a random token

An owner renews its claim every ``BEAT`` seconds by creating the next number and removing the one before; whoever takes
a claim over creates the next number, too. Both want one name, which the storage gives to one of them. So an owner that
was taken for dead, and is not, cannot renew, and finds out; it asks with ``Claim.check`` before it commits anything.
Nobody jumps over another's number, so that of two that take themselves for the owner the higher number is right.

Dead is a process of this machine that is no more; that is known at once. Of any other owner only the numbers can be
seen: it is dead when they have stood still for ``LOOKS`` looks, ``BEAT`` seconds apart. Numbers that are gone whenever
they are read, as where a read takes longer than a beat, move. No two clocks are compared, and a storage that hangs
delays both sides. Where processes cannot be told apart for sure (other hosts, other containers, no /proc), numbers
decide.

A claim cannot stop a process between its last check and the end of that commit. Against what a process does there that
sleeps through its own replacement stands what always does: files appear whole, and checksums name their content.
"""

import contextlib
import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

from pipeline import store

BEAT = 2.0
"""Seconds between two renewals."""
LOOKS = 5
"""How often in a row, ``BEAT`` seconds apart, an owner that cannot be seen must not have moved to count as dead."""
PATIENCE = 60.0
"""Seconds that a process waits which replaces another one, such as a restarted worker."""
POLL = 0.2
"""Seconds between two looks at an owner of this machine."""

Kind = Literal["claim", "writer", "evaluation"]
"""Claims of two kinds do not exclude each other: a job in a folder, who writes a run's checkpoints, an evaluation."""

_NAME = re.compile(rf"\.(?:{'|'.join(get_args(Kind))})-(\d{{8,}})")
_JITTER = random.SystemRandom()


class HeldError(ValueError):
    """Another job works in the folder."""


class LostError(ValueError):
    """Another job has taken the folder over."""


class Owner(NamedTuple):
    """Who holds a claim; the content of its file."""

    job: str
    host: str
    process: int
    """Its id; 0 where it is not known."""
    started: str
    """When the process began, as the kernel counts: ids are used again."""
    place: str
    """Boot and process namespace, in which ids mean one process; empty where they are not known."""
    token: str
    """Tells claims of one process apart."""

    def __str__(self) -> str:
        text = f"{self.job}, process {self.process or 'unknown'} on {self.host}"
        return "".join(c if c.isprintable() else "?" for c in text)[:200]  # of a file that anybody may have written

    def lives(self) -> bool | None:
        """Tell whether the process is there; None where this cannot be seen from here."""
        if not self.place or not self.process or (self.place, self.host) != (_place(), os.uname().nodename):
            return None
        started = _started(self.process)
        if started is not None:
            return started == self.started
        with contextlib.suppress(PermissionError):
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return False
        return True  # /proc hides it


_UNKNOWN = Owner("an unknown job", "an unknown host", 0, "", "", "")


class Claim:
    """A folder that this process holds; ``hold`` gives it."""

    def __init__(self, folder: str, kind: Kind, data: bytes, number: int) -> None:
        self.folder = folder
        self.lost = False
        """Whether another job is known to have taken over; ``check`` looks, this only remembers."""
        self._kind: Kind = kind
        self._data, self._number = data, number
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"claim {folder}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the folder is still held; to be called before each commit.

        Raises:
            LostError: another job has taken it over, or somebody removed the claim.
        """
        with self._lock:
            if not self.lost:
                ahead = _look(self.folder, self._kind, above=self._number)  # nobody but another moves numbers now
                own = _read(self._path(self._number))
                self.lost = own != self._data or not ahead.whole or not set(ahead.found.values()) <= {self._data}
            if self.lost:
                found = _look(self.folder, self._kind).found
                owners = [_parse(data) for _, data in sorted(found.items()) if data != self._data]
                who = f"was taken over by {owners[-1]}" if owners else "is not this job's any more: its claim is gone"
                raise LostError(
                    f"{self.folder} {who}; this process was taken for dead and has stopped before it changed anything "
                    "more; let the other end, then run the same command again"
                )

    def _keep(self) -> None:
        while not self._over.wait(BEAT) and not self.lost:
            with contextlib.suppress(Exception):  # of the storage: the next time, or ``check``, will tell
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            own, following = (self._path(self._number + step) for step in (0, 1))
            if not _create(following, self._data):
                self.lost = True
            elif _read(own) != self._data:  # another job may have come, gone, and left nothing behind
                self.lost = True
                store.remove(following)
            else:
                self._number += 1
                store.remove(own)

    def _release(self) -> None:
        self._over.set()
        self._thread.join(BEAT * LOOKS)
        with contextlib.suppress(Exception):  # what stays is of a process that will be dead: it binds nobody
            for number, data in sorted(_look(self.folder, self._kind).found.items()):
                if data == self._data:
                    store.remove(self._path(number))

    def _path(self, number: int) -> str:
        return _path(self.folder, self._kind, number)


@contextlib.contextmanager
def hold(
    folder: str,
    job: str,
    *,
    kind: Kind = "claim",
    wait: float = 0.0,
    moved: Callable[[str], None] = lambda what: None,
) -> Iterator[Claim]:
    """Hold a folder against other jobs, which is made if it is not there; leaves no trace in it.

    Args:
        folder: the resolved folder.
        job: what others are told about whoever holds it.
        kind: of the claim.
        wait: seconds to wait for an owner that lives.
        moved: called at each look while the folder is not held yet.

    Raises:
        HeldError: another job works there; the message names it.
        OSError: the folder cannot be written.
    """
    made = _missing(folder)
    data = store.sealed_json(_me(job)._asdict())
    claim = Claim(folder, kind, data, _acquire(folder, kind, data, wait, moved))
    try:
        yield claim
    finally:
        claim._release()
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(each)


def is_claim(name: str) -> bool:
    """Tell the name of a claim; a killed process leaves it behind."""
    return _NAME.fullmatch(name) is not None


def owner_of(path: str) -> Owner | None:
    """Read who holds a claim, from its file; None if that is gone."""
    data = _read(path)
    return None if data is None else _parse(data)


def _acquire(folder: str, kind: Kind, data: bytes, wait: float, tell: Callable[[str], None]) -> int:
    """Create the next claim and return its number."""
    deadline = time.monotonic() + wait
    before: dict[int, bytes] | None = None
    still = attempts = 0
    while True:
        found, whole = _look(folder, kind)
        tell("a look at who holds the folder")
        still = still + 1 if whole and found == before else 0
        owners = [_parse(each) for each in found.values()]
        seen = [owner.lives() for owner in owners]
        moved = not whole or (before is not None and found != before)
        living = [o for o, lives in zip(owners, seen, strict=True) if lives or (lives is None and moved)]
        if not whole and not living:
            living = [_UNKNOWN]
        if living and time.monotonic() >= deadline:
            raise HeldError(f"{folder} is in use by {living[-1]}; wait for it, stop it, or choose another --out")
        if living or (None in seen and still < LOOKS):
            if not living and before is None:
                print(f"{folder} is claimed by {owners[-1]}; watching whether it still works", file=sys.stderr)
            before = found
            time.sleep(BEAT if None in seen or not whole else POLL)
            continue
        number = max(found, default=0) + 1
        try:
            if not _create(_path(folder, kind, number), data):
                continue
        except FileNotFoundError:  # whoever made the folder has removed it just now
            attempts += 1
            if attempts > LOOKS:
                raise
            continue
        # Since the look another job may have come, and gone on to other numbers; that one also looks again.
        after = _look(folder, kind)
        if after.whole and after.found.items() - found.items() == {(number, data)}:
            for old in sorted(found):
                store.remove(_path(folder, kind, old))
            return number
        store.remove(_path(folder, kind, number))
        time.sleep(_JITTER.uniform(0, POLL))


class _Look(NamedTuple):
    found: dict[int, bytes]
    """Claims by number."""
    whole: bool
    """Whether none moved meanwhile; else others may be there, too."""


def _look(folder: str, kind: Kind, above: int = 0) -> _Look:
    """The claims of a kind in a folder, of the numbers above one."""
    found: dict[int, bytes] = {}
    for _ in range(LOOKS):
        names = [name for name in store.list_names(folder, f".{kind}-") if is_claim(name)]
        numbers = sorted({number for name in names if (number := int(name.rpartition("-")[2])) > above})
        found = {number: data for number in numbers if (data := _read(_path(folder, kind, number))) is not None}
        if len(found) == len(numbers):  # else one was renewed between the list and the file
            return _Look(found, whole=True)
    return _Look(found, whole=False)


def _create(path: str, data: bytes) -> bool:
    """Create a file; True also where it is there with this content, which a reply that got lost leaves."""
    return store.create(path, data) or _read(path) == data


def _read(path: str) -> bytes | None:
    try:
        return store.read_bytes(path)
    except FileNotFoundError:
        return None


def _path(folder: str, kind: Kind, number: int) -> str:
    return store.join(folder, f".{kind}-{number:08d}")


def _missing(folder: str) -> list[str]:
    """The folders that would have to be made, the deepest first."""
    missing = []
    while not store.is_url(folder) and folder and not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _parse(data: bytes) -> Owner:
    try:
        fields = store.parse_json(data, "a claim")
        owner = Owner(**{name: kind(fields[name]) for name, kind in Owner.__annotations__.items()})
        return owner if 0 < owner.process < 1 << 31 else owner._replace(process=0)
    except (ValueError, KeyError, TypeError, OverflowError):
        return _UNKNOWN


def _me(job: str) -> Owner:
    process = os.getpid()
    return Owner(job, os.uname().nodename, process, _started(process) or "", _place(), uuid.uuid4().hex)


def _place() -> str:
    """Boot and process namespace; empty where the system does not tell both."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """When a process began; empty for one that has ended and only waits to be asked for; None where none is seen."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state, threads, started = fields[0], int(fields[17]), fields[19].decode()
    return "" if state in (b"Z", b"X") and threads <= 1 else started
