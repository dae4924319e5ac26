#!/usr/bin/env python
"""Fill a gap in every clip:  jobs/interpolate.py --checkpoint RUN --data DIR --out TABLES --context 5 --closing 5"""

from pipeline.cli import main
from pipeline.config import InterpolateRun


def interpolate(run: InterpolateRun) -> str:
    from pipeline.extract import extract

    return extract(run)


if __name__ == "__main__":
    main(
        interpolate,
        InterpolateRun,
        description="Write object latents as Parquet, also of the frames between the first and the last ones of each "
        "clip, given these alone; extract.py with --context 5 --closing 5 unless told otherwise.",
    )
