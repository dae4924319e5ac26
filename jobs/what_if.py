#!/usr/bin/env python
"""Change an object, see what follows:

jobs/what_if.py --checkpoint RUN --data DIR --clip KEY --select cluster:0.1,0.2 --move 0.2,0 --out DIR
"""

from pipeline.cli import main
from pipeline.config import WhatIfRun


def what_if(run: WhatIfRun) -> str:
    from pipeline.what_if import what_if

    return what_if(run)


if __name__ == "__main__":
    main(
        what_if,
        WhatIfRun,
        description="Edit an object in the first frames of one clip and predict what follows: a film (truth, "
        "predicted, what-if) and the tables of both predictions. Many edits at once: jobs/extract.py --edits FILE.",
    )
