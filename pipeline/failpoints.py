"""Named places where a test makes a process die, hang, eat memory or find the disk full; nothing happens by default.

    OBJDYN_FAILPOINTS="publish:shard-00001=kill*5; decode:poison=hang"     POINT[:TEXT]=ACTION[*TIMES][@NTH]

A rule fires where the code reaches POINT with a subject (a path, or a video's name) that contains TEXT: from the NTH
time on that this process reaches it (1), and TIMES times (always). With ``OBJDYN_FAILPOINTS_DIR`` the times are counted
in that folder, over all processes and restarts, by one file per firing.

Points in ``store.py``: ``write`` (half of a piece of a file is written), ``sync`` (all is written, not yet durable),
``publish`` (durable under a temporary name), ``published``, ``create``, ``created``, ``remove``, ``removed``. In
``loop.py``: ``append`` (half of a line of metrics is written), ``step`` (an optimiser step has its gradients; the
subject is ``worker 0 step 00000012``). In ``shard.py``: ``decode`` (a video is about to be read; the subject is
``scan``, ``probe`` or ``build``, a space, and the video's name). In ``gloo.py``: ``meet`` (a worker looks for
the others).
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from typing import NoReturn

VARIABLE, FOLDER = "OBJDYN_FAILPOINTS", "OBJDYN_FAILPOINTS_DIR"
_RULE = re.compile(r"([a-z]+)(?::([^=]*))?=([a-z]+)(?:\*(\d+))?(?:@(\d+))?")


@dataclass
class _Rule:
    number: int
    point: str
    text: str
    action: str
    times: int | None
    nth: int
    folder: str
    reached: int = 0
    fired: int = 0

    def fires(self, point: str, subject: str) -> bool:
        if point != self.point or self.text not in subject:
            return False
        self.reached += 1
        if self.reached < self.nth:
            return False
        if not self.folder:
            self.fired += 1
            return self.times is None or self.fired <= self.times
        number = 0
        while self.times is None or number < self.times:
            try:
                os.close(os.open(os.path.join(self.folder, f"{self.number}-{number}"), os.O_CREAT | os.O_EXCL))
                return True
            except FileExistsError:
                number += 1
        return False


def arm(rules: str, folder: str = "") -> None:
    """Replace the rules of this process by those of a string as the variable holds; an empty one disarms all.

    Raises:
        ValueError: the string does not parse.
    """
    _rules[:] = _parse(rules, folder)


def reach(point: str, subject: str = "") -> None:
    """Mark a place in the code; does nothing unless a rule fires here."""
    if _rules:
        for rule in _rules:
            if rule.fires(point, subject):
                _ACTIONS[rule.action](subject)


def _parse(text: str, folder: str) -> list[_Rule]:
    rules = []
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(";")))):
        match = _RULE.fullmatch(part)
        if match is None or match[3] not in _ACTIONS:
            raise ValueError(f"{VARIABLE} holds {part!r}; wanted POINT[:TEXT]=ACTION with {', '.join(_ACTIONS)}")
        point, subject, action, times, nth = match.groups()
        limit = None if times is None else int(times)
        rules.append(_Rule(number, point, subject or "", action, limit, int(nth or 1), folder))
    return rules


def _kill(subject: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process does not go on")


def _hang(subject: str) -> NoReturn:
    while True:
        time.sleep(3600)


def _hog(subject: str) -> NoReturn:
    held = []
    while True:
        held.append(b"\x01" * (64 << 20))


def _full(subject: str) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), subject)


_ACTIONS = {"kill": _kill, "hang": _hang, "hog": _hog, "full": _full}
_rules: list[_Rule] = _parse(os.environ.get(VARIABLE, ""), os.environ.get(FOLDER, ""))
