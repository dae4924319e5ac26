"""What the data behind an evaluation are like: how many clips, how large, from where, how bright, how much moves.

``ClipFacts`` looks at each clip in passing. It sums whole numbers over uint8 frames, so that what it finds depends
neither on the batch nor on the device, and takes about a millisecond per clip of 100 frames of 64x64. ``stored_facts``
reads what a dataset folder says about itself: bytes, preprocessing, and the inputs that were left out.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from objdyn.clips import Clip
from pipeline import store
from pipeline.reader import Source

BLOCK = 1 << 21
"""Values of a clip that are looked at together: they stay in the processor's cache."""
DISTINCT = 8
"""As many frame rates are listed one by one; more only by their range."""
MOST_BINS = 24
QUARANTINE_SHOWN = 50
OUTLIERS = {
    "darkest": ("brightness", np.argmin),
    "brightest": ("brightness", np.argmax),
    "lowest contrast": ("contrast", np.argmin),
    "stillest": ("motion", np.argmin),
    "most moving": ("motion", np.argmax),
}


class Look(NamedTuple):
    """How a clip looks, for values in [0, 1]."""

    brightness: float
    """Mean over all pixels and channels."""
    contrast: float
    """Standard deviation over the pixels and channels of a frame, averaged over frames."""
    motion: float
    """Mean absolute difference between a value and the same one in the frame before; NaN for a single frame."""


class ClipFacts:
    """Facts of the clips that were added, in their order."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._looks: list[Look] = []
        self._sources: set[str] = set()
        self._fps: Counter[float] = Counter()
        self._strides: Counter[int] = Counter()
        self._seconds: list[float] = []
        self._shapes: Counter[tuple[int, ...]] = Counter()

    def add(self, clip: Clip) -> None:
        """Look at one more clip."""
        self.keys.append(clip.key)
        self._looks.append(look(clip.frames))
        self._sources.add(clip.source)
        self._fps[clip.fps] += 1
        self._strides[clip.stride] += 1
        self._seconds.append(len(clip.frames) * clip.stride / clip.fps)
        self._shapes[clip.frames.shape] += 1

    def summary(self) -> dict[str, Any]:
        """What ``metrics.json`` holds under ``data``."""
        frames, height, width, channels = self._shapes.most_common(1)[0][0]
        rates: Counter[str] = Counter()
        for fps, count in sorted(self._fps.items()):
            rates[f"{fps:g}"] += count
        looks = {name: np.array([getattr(each, name) for each in self._looks]) for name in Look._fields}
        outliers = []
        for label, (name, extreme) in OUTLIERS.items():
            if np.isfinite(looks[name]).all():
                i = int(extreme(looks[name]))  # the first of equal ones
                outliers.append({"extreme": label, "of": name, "clip": self.keys[i], "value": float(looks[name][i])})
        return {
            "clips": len(self.keys),
            "frames": frames,
            "height": height,
            "width": width,
            "channels": channels,
            "sources": len(self._sources),
            "fps": {**_range(list(self._fps.elements())), "counts": dict(rates) if len(rates) <= DISTINCT else {}},
            "strides": {str(stride): count for stride, count in sorted(self._strides.items())},
            "seconds": _range(self._seconds),
            **{name: distribution(values) for name, values in looks.items()},
            "per_clip": {
                name: [float(v) if np.isfinite(v) else None for v in values] for name, values in looks.items()
            },
            "outliers": outliers,
        }


def look(frames: np.ndarray) -> Look:
    """Measure brightness, contrast and motion of uint8 frames (t, h, w, c)."""
    values = frames.reshape(len(frames), -1)
    count = values.shape[1]
    sums, squares, changes = [], [], 0
    step = max(1, BLOCK // count)
    for first in range(0, len(values), step):
        block = values[first : first + step]
        sums.append(block.sum(axis=1, dtype=np.uint64))
        squares.append(np.square(block, dtype=np.uint16).sum(axis=1, dtype=np.uint64))
        second = max(1, first)
        now, before = block[second - first :], values[second - 1 : first + len(block) - 1]
        # The absolute difference without leaving eight bits.
        changes += int((np.maximum(now, before) - np.minimum(now, before)).sum(dtype=np.uint64))
    mean = np.concatenate(sums) / count
    variance = np.maximum(np.concatenate(squares) / count - mean**2, 0)
    pairs = (len(values) - 1) * count
    return Look(
        brightness=float(mean.mean() / 255),
        contrast=float(np.sqrt(variance).mean() / 255),
        motion=changes / pairs / 255 if pairs else float("nan"),
    )


def distribution(values: np.ndarray) -> dict[str, Any] | None:
    """Mean, spread, quartiles and a histogram of finite values; ``None`` where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    bins = min(MOST_BINS, max(4, round(2 * len(values) ** (1 / 3)))) if high > low else 1
    counts = np.histogram(values, bins=bins, range=(low, high))[0] if high > low else np.array([len(values)])
    quartiles = [float(v) for v in np.quantile(values, (0.25, 0.5, 0.75))]
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": low,
        "quartiles": quartiles,
        "max": high,
        "counts": [int(count) for count in counts],
    }


def stored_facts(data: str, source: Source) -> dict[str, Any]:
    """What a dataset folder says about the split that was opened; nothing for a simulator.

    The list of inputs that were left out is no part of what is evaluated, so one that is missing or damaged is said in
    its place and stops nothing.
    """
    if data.startswith("sim:"):
        return {}
    folder = store.join(data, source.split)
    try:
        manifest = store.read_bytes(path := store.join(folder, "manifest.json"))
        if hashlib.sha256(manifest).hexdigest() != source.id:
            raise ValueError(f"{path} has changed since the evaluation began")
        fields = store.parse_json(manifest, path)
        shards = fields["shards"]
        raw = fields["clips"] * fields["frames"] * fields["height"] * fields["width"] * fields["channels"]
        stored = {
            "shards": len(shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "raw_bytes": raw,
            "codec": fields["codec"],
            "preprocessing": fields["preprocessing"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"quarantine": {"problem": f"what {folder} says about itself cannot be read ({_told(error)})"}}
    return {"stored": stored, "quarantine": _quarantine(folder, fields)}


def _quarantine(folder: str, manifest: dict[str, Any]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.shard import QUARANTINE_SCHEMA, describe

    path = store.join(folder, "quarantine.parquet")
    try:
        table = store.read_bytes(path, manifest["quarantine"]["sha256"])
        rows = pq.read_table(io.BytesIO(table)).select(QUARANTINE_SCHEMA.names).to_pylist()
        return {
            "balance": describe(manifest["balance"]),
            "rows": len(rows),
            "codes": dict(sorted(Counter(str(row["code"]) for row in rows).items())),
            "shown": [{name: str(value) for name, value in row.items()} for row in rows[:QUARANTINE_SHOWN]],
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return {"problem": f"{path} cannot be read ({_told(error)})"}


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}
