#!/usr/bin/env python
"""Videos to tables of latents:  jobs/extract.py --checkpoint RUN --data DIR --out TABLES --context 4 --horizon 6"""

from pipeline.cli import main
from pipeline.config import ExtractRun


def extract(run: ExtractRun) -> str:
    from pipeline.extract import extract

    return extract(run)


if __name__ == "__main__":
    main(
        extract,
        ExtractRun,
        description="Write object latents as Parquet: of all frames; with --context and --horizon also of predicted "
        "ones; with --context and --closing also of those between the first and the last frames, interpolated.",
    )
