#!/usr/bin/env python
"""Simulated videos in CLEVRER's layout:  jobs/simulate_clevrer.py --out DIR --videos 50 --split train --objects 3-6"""

from pipeline.cli import main
from pipeline.config import SimulateRun


def simulate(run: SimulateRun) -> str:
    from pipeline.simulate import simulate

    return simulate(run)


if __name__ == "__main__":
    main(simulate, SimulateRun, description="Simulate videos of colliding objects, or of block towers, with all truth.")
