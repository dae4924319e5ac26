#!/usr/bin/env python
"""A checkpoint measured beside baselines:  jobs/evaluate.py --checkpoint RUN --data DIR --out DIR --horizon 40

A paper's tables:  jobs/evaluate.py --protocol bouncing-balls --checkpoint RUN --out DIR
                   jobs/evaluate.py --protocol object-dynamics --checkpoint RUN --compare provide=RUN2 --out DIR
"""

from pipeline.cli import main
from pipeline.config import EvaluateRun


def evaluate(run: EvaluateRun) -> str:
    from pipeline import store

    out = store.resolve(run.out, "--out")
    if run.protocol:
        from pipeline import object_dynamics, protocol

        measure = protocol.bouncing_balls_protocol
        if run.protocol == "object-dynamics":
            measure = object_dynamics.object_dynamics_protocol
        return f"{measure(run)}\n\nresults: {store.join(out, 'protocol.json')}"
    from pipeline import trajectories
    from pipeline.evaluate import evaluate

    return "\n\n".join([*trajectories.told(evaluate(run)), f"report: {store.join(out, 'report.html')}"])


if __name__ == "__main__":
    main(evaluate, EvaluateRun, description="Measure a checkpoint beside trivial baselines: metrics.json, report.html.")
