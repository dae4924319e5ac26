"""Extraction: what the rows hold, one row per key whatever is killed, and what is refused."""

import dataclasses
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from objdyn.clips import Clip, collate, to_model_input, to_sample
from objdyn.families import FAMILIES, build, describe
from objdyn.interface import Scene
from objdyn.metrics.segmentation import match_tracks, segment
from pipeline import extract as module
from pipeline import store, tables, verify
from pipeline.checkpoint import config_to_json, load_model, save_checkpoint
from pipeline.config import ExportRun, ExtractRun, InterpolateRun, VerifyRun
from pipeline.export import export
from pipeline.extract import clip_blocks, extract
from pipeline.presets import PRESETS
from pipeline.reader import iter_clips, open_source
from tests import plain

FRAMES, CONTEXT, HORIZON = 5, 3, 4
SHARDS = (3, 2, 1)
"""Clips in each shard of the dataset."""


def video(seed: int, t: int = FRAMES) -> np.ndarray:
    """A bright square that moves over a dark background, uint8 (t, 64, 64, 3)."""
    rng = np.random.default_rng(seed)
    frames = np.full((t, 64, 64, 3), 20, np.uint8)
    y, x, dy, dx = rng.integers([5, 5, -3, -3], [45, 45, 4, 4])
    for i in range(t):
        frames[i, y + i * dy : y + i * dy + 12, x + i * dx : x + i * dx + 12] = rng.integers(100, 255, 3)
    return frames


def write_dataset(folder: Path, sizes: tuple[int, ...] = SHARDS) -> str:
    """A dataset folder as make_shards.py leaves it, of split ``test``."""
    split = folder / "test"
    split.mkdir(parents=True)
    number, index, shards = itertools.count(), [], []
    for shard, size in enumerate(sizes):
        name = f"shard-{shard:05d}.tar"
        rows, places = [], {}
        with tarfile.open(split / name, "w") as tar:
            for i in itertools.islice(number, size):
                clip = Clip(f"clip-{i:03d}", video(i), fps=25.0, start_frame=10 * i, stride=2, source=f"{i}.mp4")
                for ext, data in to_sample(clip).items():
                    info = tarfile.TarInfo(f"{clip.key}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                rows.append(clip)
        with tarfile.open(split / name) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                places.setdefault(key, []).append({"name": ext, "offset": member.offset_data, "size": member.size})
        index.append(
            {
                "shard": [name] * size,
                "key": [clip.key for clip in rows],
                "members": [places[clip.key] for clip in rows],
                "source": [clip.source for clip in rows],
                "start_frame": [clip.start_frame for clip in rows],
                "stride": [clip.stride for clip in rows],
                "frames": [FRAMES] * size,
                "fps": [clip.fps for clip in rows],
            }
        )
        path = split / name
        shards.append(
            {
                "name": name,
                "bytes": path.stat().st_size,
                "samples": size,
                "sha256": store.sha256_file(str(path)),
            }
        )
    member = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
    types = {"members": pa.list_(member), "start_frame": pa.int32(), "stride": pa.int32(), "frames": pa.int32()}
    tables_ = [pa.table({name: pa.array(v, types.get(name)) for name, v in rows.items()}) for rows in index]
    path = split / "index.parquet"
    with pq.ParquetWriter(path, tables_[0].schema) as writer:
        for table in tables_:
            writer.write_table(table)
    manifest = {
        "schema": 1,
        "kind": "dataset",
        "name": "squares",
        "split": "test",
        "frames": FRAMES,
        "height": 64,
        "width": 64,
        "channels": 3,
        "codec": "zstd",
        "clips": sum(sizes),
        "index": {"bytes": path.stat().st_size, "sha256": store.sha256_file(str(path))},
        "shards": shards,
    }
    store.publish_json(str(split / "manifest.json"), manifest)
    return str(folder)


def write_checkpoint(
    folder: Path, seed: int, step: int = 0, best: bool = False, family: str = "ddlp", **model_settings: Any
) -> str:
    """A run folder with one more checkpoint of an untrained model."""
    run = PRESETS[family]["debug"]
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model_settings))
    torch.manual_seed(seed)
    model = build(run.model)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"family": family, "model": config_to_json(run.model), "run": config_to_json(run)}
    save_checkpoint(str(folder), step, model=model, optimizer=optimizer, state=state, keep_last=1, best=best)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("run"), seed=0)


@pytest.fixture
def without_ray() -> Iterator[None]:
    """The parts one after the other in this process; what Ray adds is tested with Ray below."""
    with plain.without_ray():
        yield


@pytest.fixture
def make_run(data: str, checkpoint: str, tmp_path: Path) -> Callable[..., ExtractRun]:
    def run(name: str = "tables", **settings: Any) -> ExtractRun:
        settings = {"context": CONTEXT, "horizon": HORIZON, "device": "cpu", **settings}
        return ExtractRun(**{"checkpoint": checkpoint, "data": data, "out": str(tmp_path / name), **settings})

    return run


def files(folder: str) -> dict[str, bytes]:
    """Every file of a folder that is not left over from a killed process."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.usefixtures("without_ray")
def test_tables_hold_every_frame_and_the_predicted_ones(make_run: Callable[..., ExtractRun]):
    run = make_run()
    line = extract(run)
    assert line.startswith(f"6 clips, {6 * (FRAMES + HORIZON) * 4} rows of objects, {6 * 9} rows of frames: {run.out}")
    objects, frames = tables.read_objects(run.out), tables.read_frames(run.out)
    keys = [tuple(row.values()) for row in objects.select(tables.OBJECT_KEY).to_pylist()]
    expected = [
        (f"clip-{clip:03d}", kind, context, "", 0, frame, k)
        for clip in range(6)
        for kind, context, span in (
            ("posterior", 0, range(FRAMES)),
            ("predicted", CONTEXT, range(CONTEXT, CONTEXT + HORIZON)),
        )
        for frame in span
        for k in range(4)
    ]
    assert keys == expected
    assert frames.num_rows == len(expected) // 4
    for row in frames.to_pylist():
        assert row["source_frame"] == 10 * int(row["clip"][-3:]) + 2 * row["frame"]
        assert (row["recon_mse"] is not None) == (row["kind"] == "posterior")
        assert (row["predict_mse"] is not None) == (row["kind"] == "predicted" and row["frame"] < FRAMES)


@pytest.mark.usefixtures("without_ray")
def test_rows_are_the_latents_and_errors_of_the_model(make_run: Callable[..., ExtractRun], checkpoint: str):
    run = make_run(limit=1)
    extract(run)
    model = load_model(checkpoint).model
    truth = to_model_input(collate([Clip("clip-000", video(0), 25.0, 0, 2, "0.mp4")]))
    with torch.no_grad():
        posterior = model.encode(truth)
        recon = model.decode(posterior).video
        predicted = model.rollout(model.encode(truth[:, :CONTEXT]), HORIZON)
        future = model.decode(predicted).video[:, : FRAMES - CONTEXT]
    for kind, latents in (("posterior", posterior), ("predicted", predicted)):
        rows = tables.read_objects(run.out).to_pandas()
        rows = rows[rows["kind"] == kind]
        position = torch.tensor(rows[["position_y", "position_x"]].to_numpy()).reshape(-1, 4, 2)
        torch.testing.assert_close(position, latents.position[0], rtol=1e-5, atol=1e-5)
        features = torch.tensor(np.stack(rows["features"].tolist())).reshape(-1, 4, 3)
        torch.testing.assert_close(features, latents.features[0], rtol=1e-5, atol=1e-5)
    frames = tables.read_frames(run.out).to_pandas()
    mse = (recon - truth).square().mean(dim=(0, 2, 3, 4)).numpy()
    np.testing.assert_allclose(frames.query("kind == 'posterior'")["recon_mse"], mse, rtol=1e-4)
    mse = (future - truth[:, CONTEXT:]).square().mean(dim=(0, 2, 3, 4)).numpy()
    np.testing.assert_allclose(frames.query("kind == 'predicted'")["predict_mse"][: len(mse)], mse, rtol=1e-4)


def test_rows_do_not_depend_on_the_batch(checkpoint: str):
    model = load_model(checkpoint).model
    clips = [Clip(f"clip-{i}", video(i), 25.0, 0, 1, f"{i}.mp4") for i in range(4)]
    settings: dict[str, Any] = {"context": CONTEXT, "horizon": HORIZON}
    together = clip_blocks(model, FAMILIES["ddlp"], clips, **settings)
    alone = [block for clip in clips for block in clip_blocks(model, FAMILIES["ddlp"], [clip], **settings)]
    pairs = zip(*(sorted(blocks, key=lambda block: block.order) for blocks in (together, alone)), strict=True)
    for one, two in pairs:
        assert one.order == two.order
        for name in one.latents:
            np.testing.assert_allclose(one.latents[name], two.latents[name], rtol=1e-5, atol=1e-5, err_msg=name)
        for name in one.errors:
            np.testing.assert_allclose(one.errors[name], two.errors[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_family_that_is_not_causal_encodes_the_context_alone(checkpoint: str):
    model = load_model(checkpoint).model
    seen: list[int] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def encode(self, frames: torch.Tensor) -> Any:
            seen.append(frames.shape[1])
            return model.encode(frames)

    clip = Clip("clip-0", video(0), 25.0, 0, 1, "0.mp4")
    for causal, lengths in ((True, [FRAMES]), (False, [FRAMES, CONTEXT])):
        seen.clear()
        spy: Any = Spy()
        clip_blocks(spy, FAMILIES["ddlp"]._replace(causal=causal), [clip], context=CONTEXT, horizon=1)
        assert seen == lengths


def test_truth_that_the_family_needs_must_be_there(checkpoint: str):
    family = FAMILIES["ddlp"]._replace(inputs={"num_objects": ""})
    clip = Clip("clip-0", video(0), 25.0, 0, 1, "0.mp4")
    with pytest.raises(ValueError, match="clip clip-0 has no truth 'num_objects'"):
        clip_blocks(load_model(checkpoint).model, family, [clip])


@pytest.mark.usefixtures("without_ray")
def test_the_manifest_tells_what_was_done(make_run: Callable[..., ExtractRun], checkpoint: str, data: str):
    run = make_run()
    extract(run)
    manifest = tables.read_manifest(run.out)
    assert manifest["model_id"] == load_model(checkpoint).model_id
    assert manifest["dataset_id"] == store.sha256_file(f"{data}/test/manifest.json")
    assert (manifest["family"], manifest["split"], manifest["object_is_track"]) == ("ddlp", "test", True)
    assert (manifest["context"], manifest["horizon"], manifest["limit"]) == (CONTEXT, HORIZON, None)
    assert [(part["name"], part["clips"]) for part in manifest["parts"]] == [
        ("shard-00000", 3),
        ("shard-00001", 2),
        ("shard-00002", 1),
    ]
    for part, table in itertools.product(manifest["parts"], ("objects", "frames")):
        path = Path(run.out, table, part["name"] + ".parquet")
        assert part[table]["sha256"] == store.sha256_file(str(path))
        assert part[table]["bytes"] == path.stat().st_size
        assert part[table]["rows"] == pq.read_metadata(path).num_rows
    found = tables.provenance_of(pq.read_schema(Path(run.out, "frames", "shard-00001.parquet")))
    assert found == ("frames", module.plan(run, run.out)[0].provenance)


@pytest.mark.usefixtures("without_ray")
def test_only_posterior_rows_without_a_context(make_run: Callable[..., ExtractRun]):
    run = make_run(context=None, horizon=None)
    extract(run)
    assert tables.read_objects(run.out)["kind"].unique().to_pylist() == ["posterior"]


@pytest.mark.usefixtures("without_ray")
def test_limit_takes_the_first_clips(make_run: Callable[..., ExtractRun]):
    run = make_run(limit=4)
    extract(run)
    assert tables.read_frames(run.out)["clip"].unique().to_pylist() == [f"clip-{i:03d}" for i in range(4)]
    assert [part["clips"] for part in tables.read_manifest(run.out)["parts"]] == [3, 1]


@pytest.mark.usefixtures("without_ray")
def test_a_rerun_does_only_what_is_missing(make_run: Callable[..., ExtractRun], monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    extract(run)
    before = files(run.out)
    Path(run.out, "frames", "shard-00001.parquet").unlink()
    done: list[str] = []
    work = module.extract_part
    monkeypatch.setattr(module, "extract_part", lambda *args: (done.append(args[-1].name), work(*args))[1])
    extract(run)
    assert done == ["shard-00001"]
    assert files(run.out) == before
    extract(run)
    assert done == ["shard-00001"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_what_is_left_to_do_is_told_by_three_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = module.Job("", "", str(tmp_path), None, 1, "cpu", tables.Provenance("ddlp", "", "", "test", True))
    parts = [module.Part(f"shard-{number:05d}", number, 1) for number in range(8)]
    names = ("parts/{}.json", "objects/{}.parquet", "frames/{}.parquet")
    for part in parts:
        for bit, name in enumerate(names):
            path = tmp_path / name.format(part.name)
            path.parent.mkdir(exist_ok=True)
            if part.shard >> bit & 1:
                path.touch()
    wanted = [part for part in parts if not all((tmp_path / name.format(part.name)).exists() for name in names)]
    asked: list[str] = []
    list_names = store.list_names
    monkeypatch.setattr(store, "exists", asked.append)
    monkeypatch.setattr(store, "list_names", lambda folder: asked.append(folder) or list_names(folder))
    assert module._undone(job, parts) == wanted == parts[:7]
    assert len(asked) == 3


@pytest.mark.usefixtures("without_ray")
def test_a_part_counts_as_done_only_with_the_record_of_its_own_attempt(
    make_run: Callable[..., ExtractRun], monkeypatch: pytest.MonkeyPatch
):
    run = make_run(limit=1)
    extract(run)
    before = files(run.out)
    Path(run.out, "frames", "shard-00000.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(store, "publish_json", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(run)
    left = {"settings.json", "objects/shard-00000.parquet", "frames/shard-00000.parquet"}
    assert set(files(run.out)) == left
    extract(run)
    assert files(run.out) == before


def test_a_folder_of_something_else_is_refused(make_run: Callable[..., ExtractRun], data: str):
    with pytest.raises(ValueError, match=r"holds something else \(a manifest.json without .*settings.json\)"):
        extract(make_run(out=f"{data}/test"))


@pytest.mark.usefixtures("without_ray")
def test_another_model_dataset_or_setting_in_the_same_folder_is_refused(
    make_run: Callable[..., ExtractRun], checkpoint: str, data: str, tmp_path: Path
):
    run = make_run(limit=1)
    extract(run)
    before = files(run.out)
    other = write_checkpoint(tmp_path / "other-run", seed=1)
    ids = load_model(checkpoint).model_id, load_model(other).model_id
    with pytest.raises(ValueError, match="model_id {}, but this run has model_id {}; choose".format(*ids)):
        extract(make_run(limit=1, checkpoint=other))
    other = write_dataset(tmp_path / "other-data", sizes=(1,))
    ids = (store.sha256_file(f"{folder}/test/manifest.json") for folder in (data, other))
    with pytest.raises(ValueError, match="dataset_id {}, but this run has dataset_id {};".format(*ids)):
        extract(make_run(limit=1, data=other))
    with pytest.raises(ValueError, match="horizon 4, but this run has horizon 2;"):
        extract(make_run(limit=1, horizon=2))
    with pytest.raises(ValueError, match="limit 1, but this run has limit None;"):
        extract(make_run())
    assert files(run.out) == before


@pytest.mark.usefixtures("without_ray")
def test_a_part_that_fails_is_named_and_the_others_are_done(
    make_run: Callable[..., ExtractRun], checkpoint: str, tmp_path: Path
):
    folder = write_dataset(tmp_path / "data")
    shard = Path(folder, "test", "shard-00001.tar")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    run = make_run(data=folder)
    with pytest.raises(
        ValueError, match=r"1 of 3 parts failed; the others are done, .* shard-00001: ValueError: .*SHA-256"
    ):
        extract(run)
    assert sorted(os.listdir(Path(run.out, "parts"))) == ["shard-00000.json", "shard-00002.json"]
    with pytest.raises(ValueError, match="not a finished folder of tables"):
        tables.read_objects(run.out)
    shard.write_bytes(whole)
    extract(run)
    assert tables.read_objects(run.out)["clip"].unique().to_pylist() == [f"clip-{i:03d}" for i in range(6)]


@pytest.mark.usefixtures("without_ray")
def test_latents_that_are_not_finite_are_kept_and_counted(
    make_run: Callable[..., ExtractRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in loaded.model.named_parameters() if name.startswith("pint")).fill_(float("nan"))
        return loaded

    monkeypatch.setattr(module, "load_model", load)
    assert "warning: 2 clips have latents that are not finite" in extract(make_run(limit=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": None}, "context was given without horizon; give both"),
        ({"context": None}, "horizon was given without context; give both"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 1, got -1"),
    ],
)
def test_impossible_settings_are_refused(make_run: Callable[..., ExtractRun], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_run(**settings)


def test_a_context_longer_than_the_clips_is_refused(make_run: Callable[..., ExtractRun]):
    with pytest.raises(ValueError, match=r"--context 6 asks for more frames than a clip of .* has \(5\)"):
        extract(make_run(context=6))


@pytest.mark.usefixtures("without_ray")
def test_the_best_checkpoint_can_be_chosen_and_is_told_by_its_model(
    make_run: Callable[..., ExtractRun], tmp_path: Path
):
    run_dir = write_checkpoint(tmp_path / "run", seed=1, best=True)
    write_checkpoint(tmp_path / "run", seed=2, step=5)
    settings: dict[str, Any] = {"checkpoint": run_dir, "limit": 1, "context": None, "horizon": None}
    best, last = make_run("best", which="best", **settings), make_run("last", **settings)
    for run, step in ((best, 0), (last, 5)):
        extract(run)
        loaded = load_model(f"{run_dir}/checkpoints/step-{step:08d}")
        assert tables.read_manifest(run.out)["model_id"] == loaded.model_id
    with pytest.raises(ValueError, match="holds tables with model_id"):
        extract(dataclasses.replace(last, out=best.out))


@pytest.mark.usefixtures("without_ray")
def test_a_simulator_is_a_source(make_run: Callable[..., ExtractRun]):
    run = make_run(data="sim:balls-interaction", limit=1, context=None, horizon=None)
    extract(run)
    assert tables.read_frames(run.out)["clip"].unique().to_pylist() == ["test-000000"]
    assert tables.read_manifest(run.out)["dataset_id"] == "sim:balls-interaction/test"


BALLS = PRESETS["iodine"]["debug"].data
EVERYTHING: dict[str, Any] = {"mask_summary": True, "masks": True, "components": True}


def first_ball_clip() -> Clip:
    return next(iter_clips(open_source(BALLS, "test"), limit=1, length=12))


@pytest.mark.usefixtures("without_ray")
def test_slots_without_identity_get_tracks_matched_by_masks(
    make_run: Callable[..., ExtractRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="iodine")
    clip = first_ball_clip()
    model = load_model(checkpoint).model
    with torch.no_grad():
        latents = model.encode(to_model_input(collate([clip])))
        # As a trained model may: in every second frame two slots have changed places.
        latents = type(latents)(*(field.clone() for field in latents))
        for field in latents:
            field[:, 1::2, :2] = field[:, 1::2, :2].flip(2)
        monkeypatch.setattr(type(model), "encode", lambda *_: latents)
        masks = model.decode(latents, components=True).masks
    settings: dict[str, Any] = {"checkpoint": checkpoint, "data": BALLS, "context": None, "horizon": None}
    run = make_run(limit=1, **settings)
    extract(run)
    found = tables.load_clip(run.out, clip.key)
    assert set(found.objects) == {"mean", "log_var", "track"}
    np.testing.assert_array_equal(found.objects["mean"], latents.mean[0].numpy())
    expected = match_tracks(segment(masks.numpy())[0], 3)
    np.testing.assert_array_equal(found.objects["track"], expected)
    assert len(np.unique(expected, axis=0)) > 1
    assert found.objects["track"].dtype == np.int32
    assert not tables.read_manifest(run.out)["object_is_track"]
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")
    with pytest.raises(ValueError, match="a iodine model carries no recurrent state; leave out --state"):
        extract(make_run(state=True, **settings))
    with pytest.raises(ValueError, match="a iodine model cannot predict"):
        extract(make_run(**{**settings, "context": 2, "horizon": 2}))


@pytest.mark.usefixtures("without_ray")
def test_static_latents_and_dynamics_are_columns_apart_beside_the_tracks(
    make_run: Callable[..., ExtractRun], tmp_path: Path
):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="oddn")
    run = make_run(checkpoint=checkpoint, data=BALLS, limit=1)
    extract(run)
    clip = first_ball_clip()
    model = load_model(checkpoint).model
    with torch.no_grad():
        posterior = model.encode(to_model_input(collate([clip])))
        seen = type(posterior)(*(field[:, :CONTEXT] for field in posterior))
        future = model.rollout(model.encode(to_model_input(collate([clip]))[:, :CONTEXT]), HORIZON)
        winners = [segment(model.decode(each, components=True).masks.numpy())[0] for each in (posterior, seen, future)]
    wanted = match_tracks(winners[0], 3), match_tracks(np.concatenate(winners[1:]), 3)[CONTEXT:]
    for kind, latents, track in zip(("posterior", "predicted"), (posterior, future), wanted, strict=True):
        found = tables.load_clip(run.out, clip.key, kind=kind).objects
        assert {name: values.shape[2:] for name, values in found.items()} == {
            "static": (8,), "static_log_var": (8,), "dynamics": (4,), "track": ()
        }  # fmt: skip
        for name in ("static", "static_log_var", "dynamics"):
            np.testing.assert_allclose(found[name], getattr(latents, name)[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["track"], track)
    assert not tables.read_manifest(run.out)["object_is_track"]
    with pytest.raises(ValueError, match="last two frames, got latents of 1; give a context of 2"):
        extract(make_run(out=str(tmp_path / "other"), checkpoint=checkpoint, data=BALLS, limit=1, context=1))


@pytest.mark.usefixtures("without_ray")
def test_masks_components_and_state_come_on_request(make_run: Callable[..., ExtractRun], tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="provide")
    settings: dict[str, Any] = {"checkpoint": checkpoint, "data": BALLS, "limit": 1, "state": True}
    run = make_run(**settings, **EVERYTHING)
    extract(run)
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")
    clip = first_ball_clip()
    model = load_model(checkpoint).model
    with torch.no_grad():
        posterior = model.encode(to_model_input(collate([clip])))
        seen = type(posterior)(*(field[:, :CONTEXT] for field in posterior))
        future = model.rollout(seen, HORIZON)
        for kind, latents in (("posterior", posterior), ("predicted", future)):
            found = tables.load_clip(run.out, clip.key, kind=kind)
            scene = model.decode(latents, components=True)
            for name in ("mean", "log_var", "hidden", "cell"):
                np.testing.assert_allclose(found.objects[name], getattr(latents, name)[0], rtol=1e-5, atol=1e-6)
            masks, components = scene.masks[0, :, :, 0].numpy(), scene.components[0].movedim(2, 4).numpy()
            assert found.objects["mask"].dtype == found.objects["component"].dtype == np.uint8
            np.testing.assert_allclose(found.objects["mask"] / 255, masks, atol=0.51 / 255)
            np.testing.assert_allclose(found.objects["component"] / 255, components, atol=0.51 / 255)
            np.testing.assert_allclose(found.objects["mask_area"].sum(1), 1.0, rtol=1e-6)
            assert np.abs(found.objects["mask_y"]).max() <= 1
            assert found.frames == {}
    whole = next(tables.iter_clips(run.out)).objects["component"]
    np.testing.assert_array_equal(tables.ClipDataset(run.out)[0].objects["component"], whole)
    with pytest.raises(
        ValueError, match=r"holds tables with extras \['mask_summary', 'masks', 'components', 'state'\],"
    ):
        extract(make_run(**settings))


@pytest.mark.usefixtures("without_ray")
def test_a_folder_from_before_there_were_extras_goes_on(make_run: Callable[..., ExtractRun]):
    run = make_run(limit=1, context=None, horizon=None)
    extract(run)
    path = Path(run.out, "settings.json")
    later = module.LATER_SETTINGS
    settings = {name: value for name, value in module.plan(run, run.out)[0].settings.items() if name not in later}
    path.write_bytes(store.sealed_json(settings))
    extract(run)
    with pytest.raises(ValueError, match=r"with extras \[\], but this run has extras \['masks'\]; choose"):
        extract(dataclasses.replace(run, masks=True))
    with pytest.raises(
        ValueError, match=r"with model_settings_changed \{\}, but this run has .*'model.kl_weight': 2.0"
    ):
        extract(dataclasses.replace(run, set=("model.kl_weight=2",)))


@pytest.mark.usefixtures("without_ray")
def test_other_model_settings_make_other_tables_and_are_recorded(make_run: Callable[..., ExtractRun], tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="iodine")
    settings: dict[str, Any] = {"checkpoint": checkpoint, "data": BALLS, "limit": 1, "context": None, "horizon": None}
    run = make_run(set=("model.num_slots=9", "model.num_refinements=2"), **settings)
    extract(run)
    changed = {"num_slots": 9, "num_refinements": 2}
    assert tables.read_manifest(run.out)["model_settings_changed"] == {f"model.{n}": v for n, v in changed.items()}
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")
    clip = first_ball_clip()
    with torch.no_grad():
        latents = load_model(checkpoint, overrides=changed).model.encode(to_model_input(collate([clip])))
    found = tables.load_clip(run.out, clip.key).objects["mean"]
    assert found.shape == (12, 9, 8)
    np.testing.assert_allclose(found, latents.mean[0], rtol=1e-5, atol=1e-6)
    extract(run)  # the same again
    before = files(run.out)
    for other in ((), ("model.num_slots=9",), ("model.num_slots=8", "model.num_refinements=2")):
        with pytest.raises(ValueError, match=r"holds tables with model_settings_changed \{.*'model.num_slots': 9"):
            extract(dataclasses.replace(run, set=other))
    assert files(run.out) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("num_slots=9",), "set changes settings of the model, written model.NAME=VALUE, got 'num_slots=9'"),
        (("model.num_slots=x",), "model.num_slots=x: 'x' is not of type int"),
        (("model.slots=9",), "IODINEConfig has no field 'slots'"),
        (("model.slot_dim=9",), "model.slot_dim=9 makes refiner.initial_mean"),
    ],
)
def test_wrong_model_settings_leave_no_folder(
    make_run: Callable[..., ExtractRun], tmp_path: Path, words: tuple[str, ...], message: str
):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="iodine")
    with pytest.raises(ValueError, match=message):
        extract(make_run(checkpoint=checkpoint, data=BALLS, context=None, horizon=None, set=words))
    assert not (tmp_path / "tables").exists()


def test_a_background_is_no_object_and_its_pixels_are_nobodys(checkpoint: str):
    clip = Clip("clip-0", video(0), 25.0, 0, 1, "0.mp4")
    model = load_model(checkpoint).model
    (block,) = clip_blocks(model, FAMILIES["ddlp"], [clip], extras=tuple(EVERYTHING))
    with torch.no_grad():
        masks = model.decode(model.encode(to_model_input(collate([clip]))), components=True).masks.numpy()
    assert block.latents["mask"].shape == (FRAMES, 4, 64, 64)
    assert block.latents["component"].shape == (FRAMES, 4, 64, 64, 3)
    np.testing.assert_allclose(block.latents["mask"] / 255, masks[0, :, 1:, 0], atol=0.51 / 255)
    won = segment(masks)[0, :, None] == np.arange(1, 5)[:, None, None]
    np.testing.assert_allclose(block.latents["mask_area"], won.mean(axis=(2, 3)))


CANNONBALLS = "sim:cannonballs:balls=1-3,size=32,frames=9"
SEEN, CLOSING, BEYOND = 3, 2, 7
"""Of 9 frames 4 are interpolated; the horizon reaches one frame beyond the clip."""


@pytest.fixture(scope="module")
def ballistic(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("ssm"), seed=0, family="ssm")


@pytest.fixture
def make_ballistic(make_run: Callable[..., ExtractRun], ballistic: str) -> Callable[..., ExtractRun]:
    def run(name: str = "tables", **settings: Any) -> ExtractRun:
        settings = {"context": SEEN, "closing": CLOSING, "horizon": None, "limit": 2, **settings}
        return make_run(name, **{"checkpoint": ballistic, "data": CANNONBALLS, **settings})

    return run


@pytest.mark.usefixtures("without_ray")
def test_a_gap_is_filled_from_both_sides_beside_the_prediction_from_one(
    make_ballistic: Callable[..., ExtractRun], ballistic: str
):
    run = make_ballistic(horizon=BEYOND)
    extract(run)
    frames = tables.read_frames(run.out).to_pandas()
    spans = frames.groupby(["clip", "kind", "context"]).frame.agg(list).to_dict()
    expected = {"posterior": (0, range(9)), "predicted": (SEEN, range(3, 10)), "interpolated": (SEEN, range(3, 7))}
    assert spans == {
        (f"test-00000{clip}", kind, context): [*span] for clip in range(2) for kind, (context, span) in expected.items()
    }
    clips = list(iter_clips(open_source(CANNONBALLS, "test"), limit=2))
    model, video = load_model(ballistic).model, to_model_input(collate(clips))
    seen = torch.tensor([True] * 3 + [False] * 4 + [True] * 2)
    counts = torch.tensor([int(clip.truth["num_objects"]) for clip in clips])
    with torch.no_grad():
        filled = model.interpolate(video, seen, counts)
        error = (model.decode(filled).video - video).square().mean((2, 3, 4))
    for i, clip in enumerate(clips):
        found = tables.load_clip(run.out, clip.key, kind="interpolated")
        assert set(found.objects) == {"present", "state", "state_cov", "mean", "log_var"}
        np.testing.assert_allclose(found.objects["state"], filled.state[i, 3:7], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.objects["state_cov"], filled.state_cov[i, 3:7], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.predict_mse, error[i, 3:7], rtol=1e-4)
        assert np.isnan(found.recon_mse).all()
    found = tables.load_clips(run.out, ["state"], kind="interpolated")
    assert [(clip.clip, clip.context, clip.frame.tolist()) for clip in found] == [
        (clip.key, SEEN, [3, 4, 5, 6]) for clip in clips
    ]
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")


@pytest.mark.usefixtures("without_ray")
def test_interpolated_clips_are_exported_as_tensors(make_ballistic: Callable[..., ExtractRun], tmp_path: Path):
    run = make_ballistic()
    extract(run)
    assert tables.read_manifest(run.out)["closing"] == CLOSING
    path = tmp_path / "gaps.parquet"
    assert export(ExportRun(run.out, str(path), kind="interpolated")).startswith("2 interpolated clips with")
    rows = pq.read_table(path)
    assert rows["frame"].to_pylist() == [[3, 4, 5, 6]] * 2
    assert rows.schema.field("state").type.shape == [4, 3, 4]
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")


def test_hidden_frames_have_no_influence_on_their_rows(ballistic: str):
    loaded = load_model(ballistic)
    clip = next(iter_clips(open_source(CANNONBALLS, "test"), limit=1))
    frames = clip.frames.copy()
    frames[SEEN : 9 - CLOSING] = 255 - frames[SEEN : 9 - CLOSING]
    blocks = [
        clip_blocks(loaded.model, describe(loaded.config), [each], context=SEEN, closing=CLOSING)[1]
        for each in (clip, dataclasses.replace(clip, frames=frames))
    ]
    assert [block.kind for block in blocks] == ["interpolated"] * 2
    for name, values in blocks[0].latents.items():
        np.testing.assert_array_equal(values, blocks[1].latents[name])


@pytest.mark.usefixtures("without_ray")
def test_masks_of_interpolated_frames_come_on_request(make_ballistic: Callable[..., ExtractRun]):
    run = make_ballistic(limit=1, **EVERYTHING)
    extract(run)
    found = tables.load_clip(run.out, "test-000000", kind="interpolated")
    assert found.objects["mask"].shape == (4, 3, 32, 32)
    assert not found.objects["mask"][:, 1:].any()  # the clip has one object


@pytest.mark.usefixtures("without_ray")
def test_a_folder_of_other_gaps_is_refused(make_ballistic: Callable[..., ExtractRun]):
    extract(make_ballistic(limit=1))
    with pytest.raises(ValueError, match="holds tables with closing 2, but this run has closing 3"):
        extract(make_ballistic(limit=1, closing=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"closing": 6}, "--context 3 and --closing 6 leave nothing to interpolate in a clip of .* 9 frames; lower"),
        ({"context": None}, "closing was given without context; give both to interpolate"),
        ({"closing": 0}, "closing must be at least 1, got 0"),
    ],
)
def test_an_impossible_gap_is_refused(
    make_ballistic: Callable[..., ExtractRun], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        extract(make_ballistic(**settings))


def test_a_family_that_cannot_interpolate_is_refused(make_run: Callable[..., ExtractRun]):
    with pytest.raises(ValueError, match=r"a ddlp model cannot interpolate; give the checkpoint .* can \(ssm\), or"):
        extract(make_run(closing=1, horizon=None))


def test_an_interpolation_asks_for_the_gap_of_the_paper_unless_told():
    run = InterpolateRun("run", "data", "out")
    assert (run.context, run.closing, run.horizon) == (5, 5, None)


def test_a_model_for_unknown_counts_needs_none(tmp_path: Path):
    clip = next(iter_clips(open_source(CANNONBALLS, "test"), limit=1, truth=()))
    known, unknown = (
        load_model(write_checkpoint(tmp_path / str(known), seed=0, family="ssm", known_count=known))
        for known in (True, False)
    )
    block, _ = clip_blocks(unknown.model, describe(unknown.config), [clip], context=SEEN, closing=CLOSING)
    assert block.latents["present"].all()
    with pytest.raises(ValueError, match=r"'num_objects'.* model.known_count=false \(--model.no-known-count\)"):
        clip_blocks(known.model, describe(known.config), [clip])


def test_mask_summary_of_masks_drawn_by_hand():
    masks = np.zeros((1, 1, 3, 3, 5), np.float32)
    masks[0, 0, 0] = 0.6
    masks[0, 0, 1, 2, 3:] = 1.0  # two pixels of the last row
    masks[0, 0, 2, 0, 0] = 0.3  # wins no pixel
    found = module._mask_summary(masks, masks.argmax(axis=2))
    np.testing.assert_allclose(found["mask_area"][0, 0], [13 / 15, 2 / 15, 0])
    np.testing.assert_allclose(found["mask_y"][0, 0, 1:], [1, -1])
    np.testing.assert_allclose(found["mask_x"][0, 0], [-(0.5 + 1) / 13, 0.75, -1])


def test_tracks_of_predicted_frames_go_on_from_the_context():
    model, family = load_toy_slots()
    clips = [Clip("clip-0", np.zeros((3, 1, 4, 3), np.uint8), 25.0, 0, 1, "0.mp4")]
    blocks = clip_blocks(model, family, clips, context=2, horizon=2)
    assert [block.latents["track"].tolist() for block in blocks] == [[[0, 1], [1, 0], [1, 0]], [[1, 0], [1, 0]]]


def test_a_model_without_masks_says_what_to_leave_out():
    model, family = load_toy_slots(masks=False)
    with pytest.raises(ValueError, match="renders no masks; leave out --mask-summary, --masks and --components"):
        clip_blocks(model, family, [Clip("clip-0", np.zeros((3, 1, 4, 3), np.uint8), 25.0, 0, 1, "0.mp4")])


def load_toy_slots(masks: bool = True) -> Any:
    """Two slots, left and right, which change places after the first frame; and its family."""

    class Latents(NamedTuple):
        mean: torch.Tensor

    class Toy:
        def encode(self, frames: torch.Tensor) -> Latents:
            left = torch.tensor([0.0, 1.0, 1.0])[: frames.shape[1]]
            return Latents(torch.stack([left, 1 - left], dim=-1)[None, :, :, None])

        def rollout(self, latents: Latents, horizon: int) -> Latents:
            return Latents(latents.mean[:, -1:].expand(-1, horizon, -1, -1))

        def decode(self, latents: Latents, components: bool = False) -> Scene:
            right = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 4)
            shares = (latents.mean[..., None, None] == right).float()
            return Scene(torch.zeros(*shares.shape[:2], 3, 1, 4), shares if masks else None, None)

    return Toy(), FAMILIES["ddlp"]._replace(tracked=False, object_columns=("mean",), frame_columns=())


@pytest.mark.usefixtures("without_ray")
def test_object_storage_gets_the_same_tables(make_run: Callable[..., ExtractRun], s3_folder: str):
    local, remote = make_run(limit=1), make_run(limit=1, out=f"{s3_folder}/tables")
    extract(local)
    extract(remote)
    assert tables.read_manifest(remote.out) == tables.read_manifest(local.out)
    assert tables.read_objects(remote.out).equals(tables.read_objects(local.out))
    with pytest.raises(ValueError, match="horizon 4, but this run has horizon 2"):
        extract(make_run(limit=1, out=remote.out, horizon=2))


@pytest.mark.usefixtures("ray_local")
def test_ray_writes_the_same_tables_and_does_the_deleted_part_again(
    make_run: Callable[..., ExtractRun], monkeypatch: pytest.MonkeyPatch
):
    run = make_run(workers=2)
    extract(run)
    before = files(run.out)
    Path(run.out, "objects", "shard-00001.parquet").unlink()
    extract(run)
    assert files(run.out) == before


# Edits and samples

EDITS: list[dict[str, Any]] = [
    {"name": "down", "select": "index:0", "move": [0.1, 0]},
    {"name": "gone", "select": "nearest:0,0", "remove": True},
    {"name": "only-here", "select": "index:1", "scale": 1.5, "clip": "clip-001"},
]


@pytest.fixture
def edits(tmp_path: Path) -> str:
    """A file with two edits for all clips and one for clip-001."""
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(EDITS))
    return str(path)


def futures(folder: str) -> dict[tuple[str, str, int], tables.ClipLatents]:
    """Predicted rows by clip, edit and sample."""
    clips = tables.iter_clips(folder, kind="predicted", edit=None, sample=None)
    return {(clip.clip, clip.edit, clip.sample): clip for clip in clips}


def rows_of(folder: str, table: str) -> pa.Table:
    """Unedited, deterministic rows."""
    rows = tables.read_objects(folder) if table == "objects" else tables.read_frames(folder)
    kept = [
        edit == "" and sample == 0
        for edit, sample in zip(rows["edit"].to_pylist(), rows["sample"].to_pylist(), strict=True)
    ]
    return rows.filter(pa.array(kept)).replace_schema_metadata()


@pytest.mark.usefixtures("without_ray")
def test_edits_and_samples_add_futures_and_leave_the_other_rows_as_they_are(
    make_run: Callable[..., ExtractRun], edits: str
):
    plain, run = make_run("plain", limit=3), make_run(limit=3, edits=edits, samples=2)
    extract(plain)
    line = extract(run)
    found = futures(run.out)
    names = {clip: ["", "down", "gone"] + ["only-here"] * (clip == "clip-001") for clip in plain_clips(3)}
    assert set(found) == {(clip, name, n) for clip in names for name in names[clip] for n in range(3)}
    runs = 3 + len(found)
    assert f"{(3 * FRAMES + len(found) * HORIZON) * 4} rows of objects" in line
    rows = tables.read_objects(run.out).select(tables.OBJECT_KEY)
    assert rows.group_by(rows.column_names).aggregate([]).num_rows == rows.num_rows
    assert runs == len({tuple(key.values())[:5] for key in rows.to_pylist()})
    for table in ("objects", "frames"):
        assert rows_of(run.out, table).equals(rows_of(plain.out, table))
    for (_, edit, _), clip in found.items():
        assert np.isnan(clip.predict_mse[: FRAMES - CONTEXT]).all() == (edit != "")
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")


def plain_clips(count: int) -> list[str]:
    return [f"clip-{i:03d}" for i in range(count)]


@pytest.mark.usefixtures("without_ray")
def test_rows_of_an_edit_are_the_future_of_the_edited_context(
    make_run: Callable[..., ExtractRun], checkpoint: str, edits: str
):
    run = make_run(limit=2, edits=edits)
    extract(run)
    model = load_model(checkpoint).model
    with torch.no_grad():
        clip = Clip("clip-001", video(1), 25.0, 0, 2, "1.mp4")
        seen = model.encode(to_model_input(collate([clip]))[:, :CONTEXT])
        position = seen.position.clone()
        position[:, :, 0, 0] += 0.1
        moved = model.rollout(seen._replace(position=position), HORIZON)
    found = futures(run.out)
    np.testing.assert_allclose(
        found["clip-001", "down", 0].objects["position"], moved.position[0], rtol=1e-4, atol=1e-4
    )
    gone = found["clip-001", "gone", 0].objects["transparency"]
    assert ((gone == 0).all(axis=0)).sum() == 1
    dataset = tables.ClipDataset(run.out, kind="predicted", edit="down")
    assert [(key.clip, key.edit) for key in dataset.keys] == [("clip-000", "down"), ("clip-001", "down")]
    with pytest.raises(
        ValueError, match=r"no predicted rows of edit 'up' and sample 0; it has edits '', 'down', 'gone'"
    ):
        tables.load_clips(run.out, kind="predicted", edit="up")


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("family", ["ddlp", "ssm"])
def test_draws_follow_from_seed_clip_and_sample_alone(
    make_run: Callable[..., ExtractRun], tmp_path: Path, family: str, edits: str
):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family=family)
    settings: dict[str, Any] = {"checkpoint": checkpoint, "limit": 3}
    if family == "ddlp":
        settings["edits"] = edits
    else:
        settings["data"] = PRESETS[family]["debug"].data
    one = make_run("one", batch_size=1, samples=2, **settings)
    four = make_run("four", batch_size=4, samples=3, **settings)
    other = make_run("other", batch_size=4, samples=1, sample_seed=1, **settings)
    for run in (one, four, other):
        extract(run)
    found, more, another = (futures(run.out) for run in (one, four, other))
    field = DRAWN[family]
    for key, clip in found.items():
        np.testing.assert_allclose(clip.objects[field], more[key].objects[field], rtol=1e-4, atol=1e-4)
        if key[2]:
            assert not np.allclose(clip.objects[field], found[*key[:2], 0].objects[field], atol=1e-3)
    assert len({clip.objects[field].tobytes() for clip in more.values()}) == len(more)
    first = next(key for key in found if key[2] == 1)
    assert not np.allclose(found[first].objects[field], another[first].objects[field], atol=1e-3)


DRAWN = {"ddlp": "features", "ssm": "state"}
"""A column that the draws change much."""


@pytest.mark.usefixtures("without_ray")
def test_edits_that_do_not_fit_a_clip_are_counted_and_the_rest_goes_on(
    make_run: Callable[..., ExtractRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "edits.json"
    far = {"name": "far", "select": "nearest:-9,-9", "move": [0.1, 0]}
    wide = {"name": "wide", "select": "index:0", "move": [0.5, 0]}
    path.write_text(json.dumps([*EDITS, far, wide]))
    run = make_run(limit=2, edits=str(path))
    told = extract(run).splitlines()
    assert told[1].startswith(
        "warning: 2 edits do not fit their clips and have no rows; the first: clip clip-000, edit far: no visible"
    )
    assert told[2].startswith("warning: ")
    assert "edits leave what the model was trained on" in told[2]
    assert {edit for _, edit, _ in futures(run.out)} == {"", "down", "gone", "only-here", "wide"}
    assert verify.verify(VerifyRun(run.out)).startswith("ok: tables")
    record = store.read_json(str(Path(run.out, "parts", "shard-00000.json")))
    assert set(record["edits"]["refused"]) == {"clip-000", "clip-001"}
    before = files(run.out)
    Path(run.out, "frames", "shard-00000.parquet").unlink()
    extract(run)
    assert files(run.out) == before


@pytest.mark.usefixtures("without_ray")
def test_a_missing_future_is_found(make_run: Callable[..., ExtractRun], edits: str, capsys: pytest.CaptureFixture[str]):
    run = make_run(limit=2, edits=edits, samples=1)
    with pytest.MonkeyPatch.context() as patch:
        whole = module.clip_blocks
        patch.setattr(
            module, "clip_blocks", lambda *a, **k: [b for b in whole(*a, **k) if (b.edit, b.sample) != ("gone", 1)]
        )
        extract(run)
    with pytest.raises(ValueError):  # noqa: PT011  # what it says is on stdout
        verify.verify(VerifyRun(run.out))
    assert "2 futures are missing, the first (clip, edit, sample) ('clip-000', 'gone', 1)" in capsys.readouterr().out


@pytest.mark.usefixtures("without_ray")
def test_edits_and_samples_are_exported_on_request(make_run: Callable[..., ExtractRun], edits: str, tmp_path: Path):
    run = make_run(limit=2, edits=edits, samples=1)
    extract(run)
    counts = {(False, False): 2, (True, False): 7, (False, True): 4, (True, True): 14}
    for (with_edits, with_samples), count in counts.items():
        chosen = {"kind": "predicted", "edits": with_edits, "samples": with_samples}
        for tensor in (True, False):
            out = str(tmp_path / f"{with_edits}-{with_samples}-{tensor}.parquet")
            export(ExportRun(run.out, out, tensor=tensor, **chosen))
            rows = pq.read_table(out)
            assert rows.num_rows == (count if tensor else count * HORIZON * 4)
            keys = {tuple(key.values()) for key in rows.select(["clip", "edit", "sample"]).to_pylist()}
            assert len(keys) == count


@pytest.mark.usefixtures("without_ray")
def test_other_edits_or_samples_in_the_same_folder_are_refused(make_run: Callable[..., ExtractRun], edits: str):
    run = make_run(limit=2)
    extract(run)
    with pytest.raises(ValueError, match=r"tables with edits \[\], but this run has edits \[\{'name': 'down'"):
        extract(dataclasses.replace(run, edits=edits))
    with pytest.raises(ValueError, match="tables with samples 0, but this run has samples 2;"):
        extract(dataclasses.replace(run, samples=2))
    extract(dataclasses.replace(run, sample_seed=5))  # without samples it changes nothing


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "select": "index:4", "remove": True}, r"edit a names particle 4, but the model has 4, 0 to 3"),
        ({"name": "a", "select": "index:0", "swap": "index:9"}, r"edit a names particle 9"),
        (
            {"name": "a", "select": "nearest:0,0", "remove": True, "frame": 3},
            "context frame 3, but there are 3, 0 to 2",
        ),
        (
            {"name": "a", "select": "index:0", "remove": True, "clip": "clip-0o1"},
            r"split 'test' of .* has no clip 'clip-0o1'; it has 6, among them clip-001",
        ),
        (
            {"name": "a", "select": "index:0", "remove": True, "clip": "clip-005"},
            "clip clip-005 is not among the first 5 of .*; raise --limit",
        ),
        ({"name": "a.b", "select": "index:0", "remove": True}, r"--edits .*edits.json: entry 0: an edit's name"),
        ({"name": "a", "select": "index:0", "turn": 3}, r"--edits .*edits.json: entry 0: an edit has no field 'turn'"),
    ],
)
def test_wrong_edits_are_refused_before_anything_starts(
    make_run: Callable[..., ExtractRun], tmp_path: Path, entry: dict[str, Any], message: str
):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([entry]))
    run = make_run(limit=5, edits=str(path))
    with pytest.raises(ValueError, match=message):
        extract(run)
    assert not Path(run.out).exists()


def test_edits_need_a_file_a_future_and_particles(make_run: Callable[..., ExtractRun], edits: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--edits .*none.json: there is no such file"):
        extract(make_run(edits=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match="edits are of predicted frames: give context and horizon, too"):
        make_run(edits=edits, context=None, horizon=None)
    with pytest.raises(ValueError, match="samples are of predicted frames"):
        make_run(samples=1, context=None, horizon=None)
    with pytest.raises(ValueError, match="samples must be 0"):
        make_run(samples=-1)
    with pytest.raises(ValueError, match=r"finds its particles anew in every frame \(model.tracking=false\)"):
        extract(make_run(edits=edits, set=("model.tracking=false",)))
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="provide")
    with pytest.raises(ValueError, match=r"a provide model has no particles to edit; give .* that has \(ddlp\)"):
        extract(make_run(edits=edits, checkpoint=checkpoint, data=PRESETS["provide"]["debug"].data))


def test_frames_of_another_size_are_refused_before_anything_starts(make_run: Callable[..., ExtractRun], tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "run", seed=0, family="iodine")
    size = PRESETS["iodine"]["debug"].model.image_size
    run = make_run(checkpoint=checkpoint, context=None, horizon=None)
    with pytest.raises(ValueError, match=f"are 64x64, the model sees {size}x{size}; make shards with --size {size}"):
        extract(run)
    assert not Path(run.out).exists()
