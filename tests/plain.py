"""The stages without Ray: their tasks and parts one after the other in the process of a test."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline import cluster, extract, shard


def run_tasks(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
    """In the place of ``shard._run_tasks``."""
    return {i: task(item) for i, item in enumerate(items)}


def schedule(job: extract.Job, todo: list[extract.Part], workers: int) -> Iterator[dict[str, Any]]:
    """In the place of ``extract._schedule``."""
    extractor = extract.Extractor(job)
    for part in todo:
        answer = extractor({name: np.array([value]) for name, value in dataclasses.asdict(part).items()})
        yield {name: values[0] for name, values in answer.items()}


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Put them there for a while, and no Ray is started or asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "_run_tasks", run_tasks)
        patch.setattr(extract, "_schedule", schedule)
        patch.setattr(cluster, "connect", lambda *_, **__: None)
        patch.setattr(cluster, "require_shared", lambda paths: None)
        yield
