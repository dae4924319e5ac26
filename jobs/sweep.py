#!/usr/bin/env python
"""Search settings of a model family:  sweep.py iodine/small --data DIR --out S --search model.kl_weight=log:0.1:10"""

from pipeline import cli
from pipeline.config import SweepRun


def _sweep(run: SweepRun) -> str:
    from pipeline.tune import sweep

    return sweep(run)


if __name__ == "__main__":
    cli.main(
        _sweep,
        SweepRun,
        description=(__doc__ or "") + "\n\nA flag that takes several values may be repeated.",
        positional=True,
    )
