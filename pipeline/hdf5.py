"""Simulated videos as an HDF5 file of R-NEM's layout."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from objdyn.clips import Clip
from objdyn.simulators import Simulator, simulator
from pipeline import store
from pipeline.config import Hdf5Run

BLOCK = 50
"""Videos that are simulated together."""


@store.job
def write_hdf5(run: Hdf5Run) -> str:
    """Write the first videos of each split; the file appears when it is complete.

    Raises:
        ValueError: there is no such simulator, or it has fewer videos than are asked for.
    """
    from objdyn.datasets.rnem_hdf5 import write_rnem_hdf5

    path = store.resolve(run.out, "--out")
    chosen = simulator(run.source.removeprefix("sim:"))
    counts = {split: count for split in ("train", "val", "test") if (count := getattr(run, split))}
    for split, count in counts.items():
        if count > chosen.episodes_per_split[split]:
            raise ValueError(f"{run.source} has {chosen.episodes_per_split[split]} videos of {split}, not {count}")

    def write(stream: BinaryIO) -> None:
        # HDF5 goes back and forth in its file, what is published is written from start to end.
        with tempfile.TemporaryDirectory(prefix="objdyn-") as folder:
            local = os.path.join(folder, "file.h5")
            write_rnem_hdf5(local, {split: _clips(chosen, split, count) for split, count in counts.items()})
            with open(local, "rb") as file:
                shutil.copyfileobj(file, stream)

    store.publish_file(path, write)
    return f"{', '.join(f'{count} videos of {split}' for split, count in counts.items())} in {path}"


def _clips(chosen: Simulator, split: str, count: int) -> Iterator[Clip]:
    for first in range(0, count, BLOCK):
        for episode in chosen.episodes(split, first, min(BLOCK, count - first), None):
            yield episode.clip()
