#!/usr/bin/env python
"""Train DLPv2:  python jobs/train_dlp.py small --data DIR --out RUN"""

from pipeline import cli
from pipeline.config import TrainRun
from pipeline.presets import ABOUT, PRESETS


def _train(run: TrainRun) -> str:
    from pipeline.train import train

    return f"run folder: {train(run)}"


if __name__ == "__main__":
    cli.main(
        _train,
        {name: (ABOUT["dlp"][name], run) for name, run in PRESETS["dlp"].items()},
        description=(__doc__ or "") + "\n\nWithout --out the run goes to the next free folder under ~/objdyn/runs.",
        default_preset="small",
    )
