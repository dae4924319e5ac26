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
        description="Write object latents, and with --context and --horizon predicted futures, as Parquet.",
    )
