"""Ends a process that no longer moves: who starts it again can do more about a lost network than it can itself."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator

STATUS = 1
"""Exit status of a process that is ended here."""


@contextlib.contextmanager
def watched(who: str, seconds: float) -> Iterator[Callable[[str], None]]:
    """Give a function to call with what was just done; the process ends once that stays away for ``seconds``.

    It ends without any cleaning up, with the last thing done and the stacks of all threads on stderr. A process that is
    stopped as a whole, or that holds the interpreter's lock, has no such thread either: others must watch over it.
    """
    done = threading.Event()
    last = [(time.monotonic(), "it started")]

    def watch() -> None:
        while not done.wait(min(seconds / 10, 5.0)):
            at, what = last[0]
            if time.monotonic() - at > seconds:
                text = f"error: {who} has not moved for {seconds:g} s (stall_seconds) since {what}; it ends itself"
                os.write(2, f"{text}, and goes on from the last checkpoint when started again\n".encode())
                faulthandler.dump_traceback(2)
                os._exit(STATUS)

    def moved(what: str) -> None:
        last[0] = (time.monotonic(), what)

    threading.Thread(target=watch, name="objdyn-watchdog", daemon=True).start()
    try:
        yield moved
    finally:
        done.set()
