#!/usr/bin/env python
"""CLEVRER's question file to a table:  jobs/read_questions.py --source train.json --out train.parquet"""

from pipeline.cli import main
from pipeline.config import ReadQuestionsRun


def read_questions(run: ReadQuestionsRun) -> str:
    from pipeline.questions import read_questions

    return read_questions(run)


if __name__ == "__main__":
    main(
        read_questions,
        ReadQuestionsRun,
        description="Check a file of CLEVRER's questions and write it as Parquet: a row per question or choice.",
    )
