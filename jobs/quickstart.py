#!/usr/bin/env python
"""Simulate videos, shard them, train, extract, evaluate and report:  jobs/quickstart.py --out FOLDER"""

from pipeline.cli import main
from pipeline.config import QuickstartRun


def quickstart(run: QuickstartRun) -> str:
    from pipeline.quickstart import quickstart

    return quickstart(run)


if __name__ == "__main__":
    main(quickstart, QuickstartRun, description="From simulated videos to tables and a report, in ten minutes.")
