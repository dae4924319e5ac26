#!/usr/bin/env python
"""A checkpoint measured beside baselines:  jobs/evaluate.py --checkpoint RUN --data DIR --out DIR --horizon 40"""

from pipeline.cli import main
from pipeline.config import EvaluateRun


def evaluate(run: EvaluateRun) -> str:
    from pipeline import store
    from pipeline.evaluate import evaluate

    evaluate(run)
    return f"report: {store.join(store.resolve(run.out, '--out'), 'report.html')}"


if __name__ == "__main__":
    main(evaluate, EvaluateRun, description="Measure a checkpoint beside trivial baselines: metrics.json, report.html.")
