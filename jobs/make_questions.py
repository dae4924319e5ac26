#!/usr/bin/env python
"""Questions about simulated videos:  jobs/make_questions.py --scenes DIR --out DIR/questions/train.json"""

from pipeline.cli import main
from pipeline.config import MakeQuestionsRun


def make_questions(run: MakeQuestionsRun) -> str:
    from pipeline.questions import ask

    return ask(run)


if __name__ == "__main__":
    main(
        make_questions,
        MakeQuestionsRun,
        description="Ask CLEVRER's four types of questions about videos that simulate_clevrer.py wrote.",
    )
