"""One what-if from checkpoint and clip to film and tables."""

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from objdyn.families import build
from pipeline import claim, extract, store, tables, verify
from pipeline.checkpoint import config_to_json, save_checkpoint
from pipeline.config import VerifyRun, WhatIfRun
from pipeline.presets import PRESETS
from pipeline.what_if import what_if

CLIP = "test-000001"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = PRESETS["ddlp"]["debug"]
    torch.manual_seed(0)
    model = build(run.model)
    state = {"family": "ddlp", "model": config_to_json(run.model), "run": config_to_json(run)}
    folder = str(tmp_path_factory.mktemp("run"))
    save_checkpoint(folder, 0, model=model, optimizer=torch.optim.Adam(model.parameters()), state=state, keep_last=1)
    return folder


@pytest.fixture
def make_run(checkpoint: str, tmp_path: Path) -> Callable[..., WhatIfRun]:
    def run(**settings: Any) -> WhatIfRun:
        settings = {"select": "index:1", "move": "0.1,0", "context": 3, "horizon": 4, "device": "cpu", **settings}
        clip = settings.pop("clip", CLIP)
        return WhatIfRun(checkpoint, "sim:balls-interaction", clip, str(tmp_path / "out"), **settings)

    return run


def test_a_what_if_has_a_film_and_the_tables_of_both_predictions(make_run: Callable[..., WhatIfRun]):
    run = make_run(films=("mp4", "gif", "png"), name="lower")
    told = what_if(run)
    assert told.startswith(f"edit lower of clip {CLIP} changes 1 of 4 particles, in frame 0:\n  particle 1 at (")
    assert f"film: {run.out}/what-if.mp4" in told
    out = Path(run.out)
    with av.open(out / "what-if.mp4") as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Image.open(io.BytesIO((out / "what-if.gif").read_bytes())) as gif:
        assert getattr(gif, "n_frames", 1) == len(shown) == 7
    assert shown[0].shape[1] > 3 * 256
    plain = tables.load_clip(run.out, CLIP, kind="predicted")
    edited = tables.load_clip(run.out, CLIP, kind="predicted", edit="lower")
    assert plain.frame.tolist() == edited.frame.tolist() == [3, 4, 5, 6]
    assert not np.array_equal(plain.objects["position"], edited.objects["position"])
    assert np.isfinite(plain.predict_mse).all()
    assert np.isnan(edited.predict_mse).all()
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")


def test_the_same_run_again_gives_the_same_bytes_and_another_edit_is_refused(make_run: Callable[..., WhatIfRun]):
    run = make_run()
    told = what_if(run)
    before = {path: path.read_bytes() for path in Path(run.out).rglob("*") if path.is_file()}
    assert what_if(run) == told
    assert {path: path.read_bytes() for path in Path(run.out).rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"holds tables with edits .* choose another --out"):
        what_if(dataclasses.replace(run, move="0.2,0"))


def test_who_lost_the_folder_does_not_finish(make_run: Callable[..., WhatIfRun], monkeypatch: pytest.MonkeyPatch):
    run = make_run(horizon=2)
    publish = extract.publish_part

    def lose(*given: Any) -> None:
        publish(*given)
        for path in Path(run.out).glob(".claim-*"):
            path.unlink()

    monkeypatch.setattr(claim, "BEAT", 60.0)
    monkeypatch.setattr(extract, "publish_part", lose)
    with pytest.raises(claim.LostError, match="its claim is gone"):
        what_if(run)
    assert not store.exists(store.join(run.out, tables.MANIFEST))


def test_a_drawn_future_is_beside_the_deterministic_one(make_run: Callable[..., WhatIfRun]):
    run = make_run(sample_seed=3, horizon=2)
    what_if(run)
    found = tables.load_clips(run.out, kind="predicted", edit=None, sample=None)
    assert [(clip.edit, clip.sample) for clip in found] == [("", 0), ("", 1), ("what-if", 0), ("what-if", 1)]


def test_a_doubtful_edit_only_warns(make_run: Callable[..., WhatIfRun]):
    told = what_if(make_run(move="0.9,0", horizon=1))
    assert re.search("warning: .* edit what-if: a move by 0.9 is larger than 0.2", told)


def test_an_empty_key_is_no_clip(make_run: Callable[..., WhatIfRun]):
    with pytest.raises(ValueError, match="has no clip ''; it has 200"):
        what_if(make_run(clip=""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "test-00001"}, r"has no clip 'test-00001'; it has 200, among them test-0"),
        ({"select": "index:7"}, "names particle 7, but the model has 4, 0 to 3"),
        ({"select": "nearest:-9,9"}, "no visible particle lies within 0.5 of .*; there are 4"),
        ({"context": 101}, "--context 101 asks for more frames"),
    ],
)
def test_what_does_not_exist_is_refused_and_leaves_nothing(
    make_run: Callable[..., WhatIfRun], settings: dict[str, Any], message: str
):
    run = make_run(**settings)
    with pytest.raises(ValueError, match=message):
        what_if(run)
    assert not Path(run.out).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"move": ""}, "changes nothing"),
        ({"move": "1"}, "move is dy,dx, as 0.2,0, got '1'"),
        ({"select": "left"}, "selects nothing"),
        ({"films": ()}, "films must name"),
        ({"fps": 0}, "fps must be positive"),
        ({"horizon": 0}, "horizon must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(make_run: Callable[..., WhatIfRun], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_run(**settings)
