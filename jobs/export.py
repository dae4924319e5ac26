#!/usr/bin/env python
"""Tables of latents to one Parquet file:  jobs/export.py --tables TABLES --tensor --out FILE.parquet"""

from pipeline.cli import main
from pipeline.config import ExportRun


def export(run: ExportRun) -> str:
    from pipeline.export import export

    return export(run)


if __name__ == "__main__":
    main(
        export,
        ExportRun,
        description="Write latents as one row of dense tensors per clip, or selected rows, in one Parquet file.",
    )
