#!/usr/bin/env python
"""Simulated videos to R-NEM's HDF5:  jobs/make_hdf5.py --source sim:bouncing-balls:balls=4 --out FILE.h5 --train 100"""

from pipeline.cli import main
from pipeline.config import Hdf5Run


def write_hdf5(run: Hdf5Run) -> str:
    from pipeline.hdf5 import write_hdf5

    return write_hdf5(run)


if __name__ == "__main__":
    main(write_hdf5, Hdf5Run, description="Write simulated videos as one HDF5 file of R-NEM's layout.")
