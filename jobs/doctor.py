#!/usr/bin/env python
"""Is all ready for a long run?  jobs/doctor.py --preset ddlp/small --source VIDEOS --data DIR --out DIR"""

import sys
from typing import Any


def doctor(run: Any) -> str:
    from pipeline.doctor import doctor

    return doctor(run)


def start() -> None:
    from pipeline.cli import main
    from pipeline.config import DoctorRun

    description = "Check software, Ray, storage, decoders and inputs, and estimate memory, disk and hours of a preset."
    main(doctor, DoctorRun, description=description)


if __name__ == "__main__":
    try:
        start()
    except ImportError as error:  # what even the command line needs is missing
        print(f"error: {error}; install objdyn with what it needs: make setup", file=sys.stderr)
        raise SystemExit(1) from None
