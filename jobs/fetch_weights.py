#!/usr/bin/env python
"""Weights for --perceptual-weights, where there is internet:  jobs/fetch_weights.py --out ~/weights/vgg16.safetensors

From official files that are here already:  jobs/fetch_weights.py --trunk vgg16-397923af.pth --heads vgg.pth --out FILE
"""

from typing import Any, BinaryIO

from pipeline.cli import main
from pipeline.config import FetchWeightsRun


def fetch_weights(run: FetchWeightsRun) -> str:
    import torch

    from pipeline import perceptual

    def load(file: BinaryIO) -> Any:
        """The only torch.load there is, and weights only: of bytes in memory whose SHA-256 is an official file's."""
        return torch.load(file, map_location="cpu", weights_only=True)

    return f"weights: {perceptual.fetch_weights(run, load)}"


if __name__ == "__main__":
    main(
        fetch_weights,
        FetchWeightsRun,
        description="Fetch the official weights of VGG16 or AlexNet and of LPIPS, check and write them as safetensors.",
    )
