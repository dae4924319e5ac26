#!/usr/bin/env python
"""Videos to a dataset:  jobs/make_shards.py --source VIDEOS --out DIR --split train --frames 20 --size 64"""

from pipeline.cli import main
from pipeline.config import ShardRun


def shard(run: ShardRun) -> str:
    from pipeline.shard import shard

    return shard(run)


if __name__ == "__main__":
    main(
        shard,
        ShardRun,
        description="Make one split of a dataset (WebDataset tars with index and manifest) from videos or a simulator.",
    )
