"""Ray Tune asks here for the next trial and tells here what became of it; the answers are a ``SweepStudy``'s.

Import this only after ``cluster.connect``, since it imports ray. Nothing here is state: Tune's own copy is thrown away,
and a restarted sweep makes new objects over the same study.
"""

import errno
import json
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from pipeline.study import SweepStudy

MOST_FAILED = 5
"""Failed trials after which a sweep stops that has no other."""


class StudySearcher(Searcher):
    """Trials of a study: first those that were interrupted, then new ones.

    A trial (``tune.train_trial``) reports ``step``, whether it is the ``last`` one, ``value`` and ``seconds`` while it
    trains, and when all is done ``over``,
    ``seed_values`` as JSON, ``seconds`` and ``picture``, or with ``over`` the reason why it ``failed``, or one for
    which the whole sweep must ``halt``.
    """

    def __init__(
        self,
        study: SweepStudy,
        out: str,
        tell: Callable[[int, str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``tell`` is called with the number of each trial that is over and what it came to, ``check`` before a trial
        begins or ends: it raises when the sweep is another driver's by now."""
        super().__init__()
        self._study, self._out, self._tell, self._check = study, out, tell, check
        self._waiting = study.interrupted()
        self._new = study.missing - len(self._waiting)
        self._pruned: set[int] = set()
        self.numbers: dict[str, int] = {}
        """Tune's id of a trial -> its number in the study; only of those that are being trained."""
        self.halted: Exception | None = None
        """Why the sweep must stop; its trials stay to be resumed."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial for Tune, or ``FINISHED``. Its settings go as JSON, in which Tune finds nothing to resolve."""
        try:
            if self.halted is not None:
                return Searcher.FINISHED
            self._check()
            if self._waiting:
                number = self._waiting.pop(0)
                settings = self._study.take_over(number)
            elif self._new > 0:
                self._new -= 1
                number, settings = self._study.ask()
            else:
                return Searcher.FINISHED
        except Exception as error:  # of the storage, or the sweep is another's: it stops with it
            self.halted = error
            return Searcher.FINISHED
        self.numbers[trial_id] = number
        return {"number": number, "settings": json.dumps(settings)}

    def judge(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take in what a trial reports; return whether to stop it."""
        number = self.numbers.get(trial_id)
        if number is None or self.halted is not None:
            return False
        try:
            if result.get("halt"):
                self.halted = OSError(errno.ENOSPC, result["halt"])
            elif not result.get("over") and self._study.report(
                number, result["step"], result["value"], last=result["last"]
            ):
                self._pruned.add(number)
                return True
        except Exception as error:
            self.halted = error
        return False

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """End a trial in the study; one that died is ended by ``died``, where its error is known."""
        number = self.numbers.get(trial_id)
        if number is None or error or self.halted is not None or not result:
            return
        try:
            if not result.get("over") and number not in self._pruned:
                return  # stopped with the sweep: it goes on when that is resumed
            self._check()
            del self.numbers[trial_id]
            self._end(number, result)
        except Exception as problem:
            self.halted = problem

    def died(self, trial_id: str, reason: str) -> None:
        """End a trial whose process died more often than it may."""
        number = self.numbers.pop(trial_id, None)
        if number is None or self.halted is not None:
            return
        try:
            self._check()
            self._fail(number, reason, None)
        except Exception as problem:
            self.halted = problem

    def _fail(self, number: int, reason: str, seconds: float | None) -> None:
        self._study.fail(number, reason, seconds)
        self._tell(number, f"failed: {reason}")
        ended = [trial for trial in self._study.record(importance=False).trials if trial.state != "running"]
        if len(ended) >= MOST_FAILED and all(trial.state == "failed" for trial in ended):
            self.halted = ValueError(
                f"the first {len(ended)} trials failed, at last: {reason}; mend that, and start again in another --out"
            )

    def began_again(self, trial_id: str) -> int | None:
        """Note that a trial whose process died begins again; return its number."""
        number = self.numbers.get(trial_id)
        if number is not None and self.halted is None:
            try:
                self._study.count_attempt(number)
            except Exception as problem:
                self.halted = problem
        return number

    def _end(self, number: int, result: dict[str, Any]) -> None:
        seconds = float(result["seconds"])
        if number in self._pruned:
            self._study.prune(number, seconds)
            self._tell(number, f"pruned at step {result['step']} after {seconds:.0f} s of training")
        elif failed := result.get("failed"):
            self._fail(number, failed, seconds)
        else:
            if picture := result.get("picture"):
                self._study.attach_picture(number, self._out, picture)
            seed_values = json.loads(result["seed_values"])
            complete = self._study.complete(number, seed_values, seconds)
            self._tell(number, f"complete after {seconds:.0f} s of training" if complete else "failed: not a number")

    # Tune saves its searcher at intervals; there is nothing to save.

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def get_state(self) -> dict[str, Any]:
        """Nothing: the study is the state."""
        return {}

    def __reduce__(self) -> Any:
        return (object, ())  # Tune pickles its settings into a folder that is never read


class StudyStopper(Stopper):
    """Stops a trial that the study prunes, and all of them when the sweep must stop."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Judge one report of a trial."""
        return self._searcher.judge(trial_id, result)

    def stop_all(self) -> bool:
        """Whether the sweep must stop."""
        return self._searcher.halted is not None

    def __reduce__(self) -> Any:
        return (object, ())


class StudyCallback(Callback):
    """Tells the study of trials whose process died, with the reason, and the user of those that begin again."""

    def __init__(self, searcher: StudySearcher, retries: int, tell: Callable[[int | None], None]) -> None:
        """``tell`` is called with the number of each trial that begins again."""
        self._searcher, self._retries, self._tell = searcher, retries, tell

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The last attempt died."""
        self._searcher.died(trial.trial_id, f"its process died {self._retries + 1} times; {_cause(trial)}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An attempt died, another begins."""
        self._tell(self._searcher.began_again(trial.trial_id))

    def __reduce__(self) -> Any:
        return (object, ())


def _cause(trial: Any) -> str:
    """The error of a trial's process in one line; Ray says no more of one that was killed than that it is gone."""
    error = trial.get_error()
    error = getattr(error, "cause", None) or error
    if error is None or type(error).__name__ == "ActorDiedError":
        return "it was killed, or crashed, or ran out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
