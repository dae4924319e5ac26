#!/usr/bin/env python
"""Data, runs and tables read again, and what is wrong in them:  jobs/verify.py DIR [--clean] [--min-age MINUTES]"""

from pipeline.cli import main
from pipeline.config import VerifyRun


def verify(run: VerifyRun) -> str:
    from pipeline.verify import verify

    return verify(run)


if __name__ == "__main__":
    main(
        verify,
        VerifyRun,
        description="Read a dataset, run, checkpoint, tables or evaluation again, and say what is wrong where.",
        positional=True,
    )
