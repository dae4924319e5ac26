"""One what-if: a clip's context with an edit, the future that follows beside the one without it, film and tables.

    OUT/what-if.mp4                       truth | predicted | what-if, with the ways of the visible particles
    OUT/settings.json, objects/, ...      tables as ``extract.py`` writes them, of the frames shown of this clip:
                                          posterior rows, predicted rows without an edit and with the edit's name

The edit itself is in ``objdyn/models/what_if.py``. Runs in this process, without Ray.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from objdyn import figures
from objdyn.clips import Clip
from objdyn.families import FAMILIES
from objdyn.models import what_if as edits
from objdyn.models.dlp import Particles
from pipeline import claim, extract, store, tables
from pipeline.checkpoint import load_model
from pipeline.config import WhatIfRun, torch_device
from pipeline.reader import open_source
from pipeline.tables import Block

SIDE = 256
"""Pixels that a panel of the film is about as high as."""
STRIP_COLUMNS = 10
"""Frames in the picture of some frames."""
NO_TRUTH = 235
"""Grey level of the truth's panel after the clip has ended."""
PANELS = ("truth", "predicted", "what-if")


@store.job_into_folder
def what_if(run: WhatIfRun) -> str:
    """Write the film and the tables of a what-if; the same run again writes the same files.

    Returns:
        Lines that say which particles were changed, what is doubtful, and where the film is.

    Raises:
        ValueError: clip, particle or point do not exist, the model has no particles, or checkpoint, data, settings and
            what is in the folder do not fit together.
    """
    out = store.resolve(run.out, "--out")
    edit, device = run.edit, torch_device(run.device)
    job, (part,) = extract.plan(run.extraction, out, edits=[edit], clip=run.clip)
    loaded = load_model(job.checkpoint, device=device, overrides=job.overrides)
    source = open_source(job.data, run.split)
    family = FAMILIES[loaded.family]
    shown = min(source.num_frames, run.context + run.horizon)
    shard = source.open_shard(part.shard)
    clip = shard.clip(source.keys(part.shard).index(run.clip), 0, shown, truth=family.inputs)
    blocks = extract.clip_blocks(
        loaded.model,
        family,
        [clip],
        context=run.context,
        horizon=run.horizon,
        device=device,
        samples=job.samples,
        sample_seed=job.sample_seed,
        edits=[edit],
    )
    by_key = {(block.kind, block.edit, block.sample): block for block in blocks}
    posterior = _particles(by_key["posterior", "", 0])
    context = posterior.frames(0, run.context)
    chosen = edits.select(context, edit.select, frame=edit.frame, radius=edit.radius)
    doubts = edits.concerns(context, edit)
    predicted, other = (_particles(by_key["predicted", name, job.samples]) for name in ("", edit.name))
    after = edits.apply(context, [edit]).latents

    with claim.hold(out, "what_if") as held:
        extract.open_folder(job)
        held.check()
        store.remove(store.join(out, tables.MANIFEST))  # the folder is not complete until both tables are there again
        ways = _joined(context, predicted), _joined(after, other)
        films = _films(run, loaded.model, clip, posterior, *ways, chosen[0])
        for name, data in films.items():
            store.publish(store.join(out, name), data)
        notes = [extract.EditNote(run.clip, edit.name, "; ".join(doubts), refused=False)] if doubts else []
        extract.publish_part(family, job, part, blocks, notes)
        held.check()
        tables_line = extract.finish(job, [part])
    lines = edits.describe(context, chosen, frame=edit.frame)
    count = f"{len(lines)} of {chosen.shape[1]} particles"
    return "\n".join(
        [
            f"edit {edit.name} of clip {run.clip} changes {count}, in frame {edit.frame}:",
            *(f"  {each}" for each in lines),
            tables_line,
            *(f"film: {store.join(out, name)}" for name in films),
        ]
    )


def _particles(block: Block) -> Particles:
    """The particles that a block holds, so that the film shows what the tables have."""
    return Particles(**{name: torch.from_numpy(block.latents[name])[None] for name in Particles._fields})


def _joined(*parts: Particles) -> Particles:
    return Particles(*(torch.cat(fields, dim=1) for fields in zip(*parts, strict=True)))


def _films(
    run: WhatIfRun,
    model: Any,
    clip: Clip,
    posterior: Particles,
    predicted: Particles,
    other: Particles,
    chosen: torch.Tensor,
) -> Mapping[str, bytes]:
    """The files that the run asks for: name -> bytes."""
    length, known = run.context + run.horizon, min(len(clip.frames), run.context + run.horizon)
    truth = np.full((length, *clip.frames.shape[1:3], 3), NO_TRUTH, np.uint8)
    truth[:known] = clip.frames[:known]  # one channel becomes three
    videos = (truth, *(_decode(model, latents) for latents in (predicted, other)))
    factor = max(1, round(SIDE / clip.frames.shape[1]))
    panels = {}
    for label, frames, latents in zip(PANELS, videos, (posterior, predicted, other), strict=True):
        position, transparency = (field[0, :length].numpy() for field in (latents.position, latents.transparency))
        missing = length - len(position)
        panels[label] = figures.draw_trails(
            frames,
            np.pad(position, [(0, missing), (0, 0), (0, 0)]),
            transparency=np.pad(transparency, [(0, missing), (0, 0)]),  # not visible where there is no frame
            highlighted=chosen.numpy(),
            factor=factor,
            threshold=edits.VISIBLE,
        )
    seen = [t < run.context for t in range(length)]
    captions = [f"frame {t}, {'context' if early else 'predicted'}" for t, early in enumerate(seen)]
    captions = [text if t < known else f"{text}, after the clip's end" for t, text in enumerate(captions)]
    colours = [figures.CONTEXT if early else figures.PREDICTED for early in seen]
    borders = {"predicted": colours, "what-if": colours}
    films: dict[str, bytes] = {}
    if "mp4" in run.films:
        pictures = figures.side_by_side(panels, captions=captions, borders=borders)
        films["what-if.mp4"] = figures.mp4(pictures, fps=run.fps)
    if "gif" in run.films:
        gif = figures.animation(panels, fps=run.fps, captions=captions, borders=borders, encoding="gif")
        films["what-if.gif"] = gif
    if "png" in run.films:
        columns = np.unique(np.linspace(0, length - 1, min(length, STRIP_COLUMNS)).round().astype(int))
        first = int(np.searchsorted(columns, run.context))
        rows = {label: frames[columns] for label, frames in panels.items()}
        films["what-if.png"] = figures.png(figures.strip(rows, [str(t) for t in columns], first_predicted=first))
    return films


def _decode(model: Any, latents: Particles) -> np.ndarray:
    """The frames that particles render, uint8 (t, h, w, 3)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        video = model.decode(Particles(*(field.to(device) for field in latents))).video[0]
    return (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
