#!/usr/bin/env python
"""Where the time goes:  jobs/benchmark.py ddlp --preset small --out NUMBERS.json"""

from pipeline.cli import main
from pipeline.config import BenchmarkRun


def benchmark(run: BenchmarkRun) -> str:
    from pipeline.benchmark import benchmark

    return benchmark(run)


if __name__ == "__main__":
    main(
        benchmark,
        BenchmarkRun,
        description="Measure a family's training step and verbs, and each stage beside the same work without Ray.",
        positional=True,
    )
