"""How a job is asked to end in time: SIGTERM to a process, and a file for those on other machines.

A spot machine, Kubernetes and ``ray job stop`` send SIGTERM, and SIGKILL some seconds later. What then ends a job is a
``Preempted`` error in its main thread. A training ends after its optimiser step, which it saves; its driver passes the
word on to the workers through ``RUN/.stop``, which anybody may make who wants a run to end.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from pipeline import store

STATUS = 75
"""Exit status of a job that was asked to end and would go on when started again: EX_TEMPFAIL of sysexits.h."""
FILE = ".stop"
"""In a run folder: asks the workers to save and to end."""
LOOK_SECONDS = 1.0
"""How often a worker looks for that file."""
AGAIN = "run the same command again to go on, with --resume where the job has that flag"


class Preempted(KeyboardInterrupt):  # the one exception that Ray lets a signal raise while the main thread waits for it
    """The job was asked to end; what it finished is on disk."""


@contextlib.contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` in the main thread whenever SIGTERM arrives; no change where this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Turn SIGTERM into a ``Preempted`` error of what runs inside, in the main thread.

    Raises:
        Preempted: SIGTERM arrived.
    """
    told = threading.Event()

    def act() -> None:
        if not told.is_set():  # once: what cleans up is left alone
            told.set()
            raise Preempted(f"preempted by SIGTERM; {AGAIN}")

    try:
        with on_sigterm(act):
            yield
    except KeyboardInterrupt as error:
        if told.is_set() and not isinstance(error, Preempted):  # Ray raises its own in the place of ours
            raise Preempted(f"preempted by SIGTERM; {AGAIN}") from None
        raise


@contextlib.contextmanager
def keep_handler() -> Iterator[None]:
    """Put the handler of SIGTERM back that something inside replaces, as ``ray.init`` does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def requests(out: str, look: bool) -> Iterator[threading.Event]:
    """An event that is set once a run is asked to end: by SIGTERM to this process, or with ``look`` by its file."""
    asked, done = threading.Event(), threading.Event()
    path = store.join(out, FILE)

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # storage that is out of reach now: the next look
                if store.exists(path):
                    asked.set()
                    return

    if look:
        threading.Thread(target=watch, name="objdyn-stop", daemon=True).start()
    try:
        with on_sigterm(asked.set):
            yield asked
    finally:
        done.set()


@contextlib.contextmanager
def passed_on(out: str, grace_seconds: float) -> Iterator[Callable[[], bool]]:
    """Pass SIGTERM to this process on to a run's workers, which are to end by themselves; gives whether they were told.

    Raises:
        Preempted: what runs inside was not done ``grace_seconds`` later.
    """
    told, done, overdue = (threading.Event() for _ in range(3))
    path = store.join(out, FILE)
    late = Preempted(f"preempted by SIGTERM; not all workers had stopped {grace_seconds:g} s later, so {AGAIN}")

    def pass_on() -> None:
        with contextlib.suppress(Exception):  # then the workers end with this process
            store.publish(path, b"")
        if not done.wait(grace_seconds):
            overdue.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def act() -> None:
        if not told.is_set():
            told.set()
            threading.Thread(target=pass_on, name="objdyn-stop", daemon=True).start()
        elif overdue.is_set() and not done.is_set():
            done.set()
            raise late

    def were_told() -> bool:
        return told.is_set() or store.exists(path)

    try:
        with on_sigterm(act):
            try:
                yield were_told
            finally:
                done.set()  # while the handler is ours: a SIGTERM that the thread sends now must not end the process
    except KeyboardInterrupt as error:
        if overdue.is_set() and not isinstance(error, Preempted):  # Ray raises its own in the place of ours
            raise late from None
        raise
    finally:
        if told.is_set():
            with contextlib.suppress(Exception):  # the next run on the folder removes it
                store.remove(path)
