"""Verifying: what is whole passes, every damage is found, and no reader takes damaged bytes for data."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from objdyn import families
from objdyn.clips import Clip, from_sample, to_sample
from pipeline import checkpoint, loop, status, store, tables
from pipeline import extract as extraction
from pipeline import shard as sharding
from pipeline import verify as module
from pipeline.config import ExtractRun, ShardRun, VerifyRun
from pipeline.presets import PRESETS
from pipeline.reader import iter_clips, open_source
from pipeline.verify import FaultError, verify, verify_checkpoint, verify_part, verify_shard, verify_table
from tests import plain

FLIPS = 300
FRAMES, CONTEXT, HORIZON = 5, 2, 4
TALLY: dict[str, tuple[int, int, int]] = {}
"""Damage -> injected, found by verify, read as if nothing were wrong."""


@pytest.fixture(scope="module")
def without_ray() -> Iterator[None]:
    """The tasks of sharding and the parts of extraction one after the other in this process."""
    with plain.without_ray():
        yield


def sharding_run(data: Path, split: str) -> ShardRun:
    return ShardRun(
        source="sim:balls-interaction",
        out=str(data),
        split=split,
        frames=FRAMES,
        hop=50,
        limit=2,
        clips_per_shard=2,
    )


def extraction_run(root: Path, out: Path) -> ExtractRun:
    return ExtractRun(
        checkpoint=str(root / "run"),
        data=str(root / "data"),
        out=str(out),
        context=CONTEXT,
        horizon=HORIZON,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """``data/{train,val,test}`` of two shards with two clips each, ``run`` with two checkpoints, and its ``tables``."""
    root = tmp_path_factory.mktemp("whole")
    for split in ("train", "val", "test"):
        sharding.shard(sharding_run(root / "data", split))
    debug = PRESETS["ddlp"]["debug"]
    run = dataclasses.replace(
        debug,
        data=str(root / "data"),
        out=str(root / "run"),
        steps=2,
        clip_frames=3,
        checkpoint_every=1,
        eval_every=1,
        eval_clips=1,
        optim=dataclasses.replace(debug.optim, batch_size=1),
        device="cpu",
        threads=1,
    )
    loop.train(loop.open_run(run), loop.Worker())
    extraction.extract(extraction_run(root, root / "tables"))
    return root


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Few weights, so that hashing them hundreds of times is quick."""

    size: int = 6


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.size, config.size)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a family ``toy`` with checkpoints of steps 1 and 2, the first of them the best."""
    with pytest.MonkeyPatch.context() as patch:
        toy: Any = Toy
        family = families.Family(ToyConfig, toy, {}, (), True, True, (), ())
        patch.setitem(families.FAMILIES, "toy", family)
        folder = tmp_path_factory.mktemp("toy") / "run"
        write_toy_run(folder)
        yield folder


def write_toy_run(folder: Path, **settings: Any) -> None:
    torch.manual_seed(0)
    model = Toy(ToyConfig())
    optimizer = torch.optim.Adam(model.parameters())
    run = {"model": {"size": 6}, "seed": 0, "steps": 2, "out": str(folder), **settings}
    store.publish_json(str(folder / "config.json"), {"family": "toy", "run": run})
    store.publish(str(folder / "metrics.jsonl"), b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    for step in (1, 2):
        model.layer(torch.ones(6)).sum().backward()
        optimizer.step()
        state = {"family": "toy", "run": run, "dataset_id": "d", "position": step}
        checkpoint.save_checkpoint(
            str(folder), step, model=model, optimizer=optimizer, state=state, keep_last=3, best=step == 1
        )


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies folders, by links: whoever changes a file replaces it."""

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name, copy_function=os.link))

    return copied


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object], seal: bool = True) -> None:
    """Change sealed JSON, and seal it again or leave the old seal."""
    value = json.loads(path.read_bytes())
    old = value.pop(store.SEAL)
    change(value)
    replace(path, store.sealed_json(value) if seal else store.json_bytes({**value, store.SEAL: old}))


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file inverted for a while, in place: a file of its own, which no other test reads."""
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
        try:
            yield
        finally:
            file.seek(bit // 8)
            file.write(bytes([byte]))


def run_of(path: Path | str, **settings: Any) -> VerifyRun:
    return VerifyRun(str(path), **settings)


def findings(path: Path | str, capsys: pytest.CaptureFixture[str], **settings: Any) -> list[tuple[str, str]]:
    """The kind and place of each finding of the whole command; none if it passes."""
    capsys.readouterr()
    with contextlib.suppress(ValueError):
        verify(run_of(path, **settings))
        return []
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return [(kind, rest.partition(": ")[0]) for kind, rest in lines if kind not in ("note", "removed")]


# What is whole


def test_untouched_folders_pass(whole: Path, capsys: pytest.CaptureFixture[str]):
    line = verify(run_of(whole))
    for text in ("test: 2 shards, 4 clips", "train: 2 shards", "val: 2 shards", "run run: 2 checkpoints, the newest"):
        assert text in line
    rows = 4 * (FRAMES + HORIZON) * (4 + 1)
    assert f"tables tables: 2 parts, 4 clips, {rows} rows" in line
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("data", r"dataset \w{12} test: .*; dataset \w{12} train: .*; dataset \w{12} val: "),
        ("data/test", r"dataset \w{12} test: "),
        ("run", "run run: "),
        ("run/checkpoints", "checkpoint step-00000001, .*; checkpoint step-00000002, "),
        ("run/checkpoints/step-00000002", "checkpoint step-00000002, "),
        ("tables", "tables tables: "),
    ],
)
def test_each_kind_of_folder_can_be_given(whole: Path, place: str, says: str):

    assert re.match(rf"ok: {says}[^;]*; read in [\d.]+ s$", verify(run_of(whole / place)))


def test_an_evaluation_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store.publish_json(str(tmp_path / "metrics.json"), {"kind": "metrics", "recon_psnr": 30.0})
    store.publish(str(tmp_path / "report.html"), b"<html>")
    assert verify(run_of(tmp_path)).startswith("ok: evaluation ")
    (tmp_path / "report.html").unlink()
    edit(tmp_path / "metrics.json", lambda metrics: metrics.update(recon_psnr=40.0), seal=False)
    assert findings(tmp_path, capsys) == [("damaged", "metrics.json"), ("missing", "report.html")]


@pytest.mark.parametrize("place", ["", "file", "nothing"])
def test_what_is_nothing_of_ours_is_refused(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("notes")
    says = {"": "holds no dataset, run", "file": "is a file", "nothing": "does not exist"}[place]
    with pytest.raises(ValueError, match=rf"{says}.*; give the"):
        verify(run_of(tmp_path / place))
    with pytest.raises(ValueError, match="is a simulator and has no files"):
        verify(run_of("sim:balls-interaction"))


def test_folders_of_other_software_are_not_taken_for_ours(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole / "data/test", tmp_path / "data/test")
    for name in (
        "web/config.json",
        "web/manifest.json",
        "web/metrics.json",
        "editor/settings.json",
        "hub/model.safetensors",
        "theirs/checkpoints/step-00000100/weights.bin",
        "theirs/metrics.jsonl",
        "webdataset/shard-00000.tar",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert verify(run_of(tmp_path)).count("; ") == 1
    assert capsys.readouterr().out == (
        "note      not of this software, left alone: editor, hub, theirs, web, webdataset\n"
    )


def test_what_lies_inside_a_run_is_verified_too(
    toy_run: Path, whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    run = copy(toy_run)
    shutil.copytree(whole / "tables", run / "out/tables")
    store.publish_json(str(run / "report/metrics.json"), {"kind": "metrics"})
    store.publish(str(run / "report/report.html"), b"<html>")
    line = verify(run_of(run))
    assert all(text in line for text in ("run run: 2 checkpoints", "tables tables: 2 parts", "evaluation report"))
    assert capsys.readouterr().out == ""
    (run / "out/tables/manifest.json").unlink()
    assert findings(run, capsys) == [("missing", "out/tables/manifest.json")]


def test_a_long_verification_says_how_far_it_is(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    verify(run_of(whole / "data/test"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(status, "LOG_SECONDS", 0.0)
    verify(run_of(whole / "data/test"))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("verify: 1/2 shards")
    assert last.startswith("verify: 2/2 shards")


# Flipped bits and cuts: everything found, nothing read silently


def bits(path: Path, count: int = FLIPS) -> list[int]:
    return random.Random(path.name).sample(range(8 * path.stat().st_size), count)


def tally(name: str, injected: int, found: int, silent: int) -> None:
    TALLY[name] = (injected, found, silent)
    assert (found, silent) == (injected, 0)


def digest(clips: Iterator[Clip]) -> str:
    hashed = hashlib.sha256()
    for clip in clips:
        hashed.update(f"{clip.key} {clip.source} {clip.start_frame} {clip.stride} {clip.fps}".encode())
        hashed.update(clip.frames.tobytes())
        for name in sorted(clip.truth):
            hashed.update(clip.truth[name].tobytes())
    return hashed.hexdigest()


def wrong(read: Callable[[], Any], right: Any, name: str) -> bool:
    """Whether a reader neither gives what is right nor refuses with the file's name."""
    try:
        return read() != right
    except ValueError as error:
        return name not in str(error)


def read_dataset(data: Path) -> str:
    return digest(iter_clips(open_source(str(data), "test")))


def shard_facts(folder: Path, number: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[int, ...]]:
    manifest = store.read_json(str(folder / "manifest.json"))
    rows = pq.ParquetFile(folder / "index.parquet").read_row_group(number).to_pylist()
    return manifest["shards"][number], rows, (FRAMES, 64, 64, 3)


@pytest.fixture
def split(tmp_path: Path, whole: Path) -> Path:
    """A dataset's split that may be changed in place."""
    return Path(shutil.copytree(whole / "data/test", tmp_path / "data/test"))


def test_bits_flipped_in_a_tar(split: Path):
    path, right = split / "shard-00000.tar", read_dataset(split.parent)
    listed, rows, shape = shard_facts(split)
    found = silent = 0
    for bit in bits(path):
        with flipped(path, bit):
            with contextlib.suppress(FaultError):
                verify_shard(str(path), listed, rows, shape)
                found -= 1
            found += 1
            silent += wrong(lambda: read_dataset(split.parent), right, path.name)
    verify_shard(str(path), listed, rows, shape)
    tally("tar, bits flipped", FLIPS, found, silent)


@pytest.mark.parametrize("name", ["index.parquet", "manifest.json"])
def test_bits_flipped_in_the_files_of_a_dataset(split: Path, name: str):
    right = read_dataset(split.parent)
    folder = module.Folder(str(split), "split", store.list_folder(str(split)))
    manifest = store.read_json(str(split / "manifest.json"))
    found = silent = 0
    for bit in bits(split / name):
        with flipped(split / name, bit):
            with contextlib.suppress(FaultError):
                if name == "index.parquet":
                    module._read_index(folder, manifest)
                else:
                    module._sealed(folder.at(name), "")
                found -= 1
            found += 1
            silent += wrong(lambda: read_dataset(split.parent), right, name)
    tally(f"{name}, bits flipped", FLIPS, found, silent)


@pytest.mark.parametrize("table", ["objects", "frames"])
def test_bits_flipped_in_a_part_of_the_tables(whole: Path, tmp_path: Path, table: tables.Table):
    folder = Path(shutil.copytree(whole / "tables", tmp_path / "tables"))
    settings = store.read_json(str(folder / "settings.json"))
    record = store.read_json(str(folder / "parts/shard-00000.json"))
    path = folder / table / "shard-00000.parquet"
    read = tables.read_objects if table == "objects" else tables.read_frames
    right = read(str(folder))
    found = silent = 0
    for bit in bits(path):
        with flipped(path, bit):
            with contextlib.suppress(FaultError):
                verify_table(str(folder), table, record, settings)
                found -= 1
            found += 1
            silent += wrong(lambda: read(str(folder)), right, path.name)
    assert verify_part(str(folder), record, settings).findings == []
    tally(f"{table} part, bits flipped", FLIPS, found, silent)


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "parts/shard-00001.json"])
def test_bits_flipped_in_the_json_of_the_tables(whole: Path, tmp_path: Path, name: str):
    folder = Path(shutil.copytree(whole / "tables", tmp_path / "tables"))
    read: dict[str, Callable[[], Any]] = {"manifest.json": lambda: tables.read_frames(str(folder))}
    read_it = read.get(name, lambda: store.read_json(str(folder / name)))  # as extract.py reads the others
    right = read_it()
    found = silent = 0
    for bit in bits(folder / name):
        with flipped(folder / name, bit):
            with contextlib.suppress(FaultError):
                module._sealed(str(folder / name), "")
                found -= 1
            found += 1
            silent += wrong(read_it, right, name)
    tally(f"tables' {name}, bits flipped", FLIPS, found, silent)


def read_run(run: Path) -> list[Any]:
    saved = checkpoint.load_last(str(run))
    loaded = checkpoint.load_model(str(run))
    assert saved is not None
    tensors = [*saved.model.values(), *saved.optimizer.values(), *loaded.model.state_dict().values()]
    return [tensor.tolist() for tensor in tensors] + [saved.step, saved.state, loaded.model_id, loaded.run]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_bits_flipped_in_a_checkpoint(toy_run: Path, tmp_path: Path, name: str):
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    folder, right = run / "checkpoints/step-00000002", read_run(run)
    found = silent = 0
    for bit in bits(folder / name):
        with flipped(folder / name, bit):
            found += name in {finding.path for finding in verify_checkpoint(str(folder))[1]}
            silent += wrong(lambda: read_run(run), right, name)
    assert verify_checkpoint(str(folder))[1] == []
    tally(f"{name}, bits flipped", FLIPS, found, silent)


def test_every_cut_of_a_tar(split: Path):
    """Cut after each 512 bytes: shorter, filled up with zeros, and with a manifest that says the same."""
    path = split / "shard-00000.tar"
    data, right = path.read_bytes(), read_dataset(split.parent)
    listed, rows, shape = shard_facts(split)
    end = max(m["offset"] + -(-m["size"] // 512) * 512 for row in rows for m in row["members"]) + 1024
    cuts = range(0, len(data), 512)
    found = silent = 0
    for cut in cuts:
        for kind, left in {"shorter": data[:cut], "zeros": data[:cut].ljust(len(data), b"\0")}.items():
            if left == data:
                continue  # only zeros were cut
            path.write_bytes(left)
            with contextlib.suppress(FaultError):
                verify_shard(str(path), listed, rows, shape)
                found -= 1
            found += kind == "shorter"
            silent += wrong(lambda: read_dataset(split.parent), right, path.name)
        said = {**listed, "bytes": cut, "sha256": hashlib.sha256(data[:cut]).hexdigest()}
        path.write_bytes(data[:cut])
        with contextlib.suppress(FaultError):
            verify_shard(str(path), said, rows, shape)
            assert cut >= end, "a cut tar passes with a manifest that was made to say so"
    tally("tar, cut at every 512 bytes", len(cuts), found, silent)


def test_bits_flipped_anywhere_are_found_by_the_whole_command(
    whole: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for folder in (whole / "data/test", toy_run, whole / "tables"):
        shutil.copytree(folder, tmp_path / folder.name)
    unrecorded = ("tensorboard", "metrics.jsonl")
    paths = [p for p in sorted(tmp_path.rglob("*")) if p.is_file() and not set(p.parts) & set(unrecorded)]
    found = 0
    for path in paths:
        with flipped(path, bits(path, 1)[0]):
            found += ("damaged", str(path.relative_to(tmp_path))) in findings(tmp_path, capsys)
    assert findings(tmp_path, capsys) == []
    tally("any file, whole command", len(paths), found, 0)


def test_what_the_findings_advise_mends_a_dataset(split: Path, capsys: pytest.CaptureFixture[str]):
    """Run make_shards.py again with the same flags."""
    before = contents(split)
    for damaged, missing in ((["shard-00000.tar"], ["shard-00001.tar", "quarantine.parquet"]), (["index.parquet"], [])):
        for name in damaged:
            replace(split / name, before[name][:-1])
        for name in missing:
            (split / name).unlink()
        assert len(findings(split, capsys)) == len(damaged) + len(missing)
        sharding.shard(sharding_run(split.parent, "test"))
        assert findings(split, capsys) == []
        assert contents(split) == before


def test_what_the_findings_advise_mends_tables(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    """Delete what is damaged and run extract.py again with the same flags."""
    folder = copy(whole / "tables")
    before = contents(folder)
    damaged = ["manifest.json", f"objects/{PART}.parquet", "parts/shard-00000.json"]
    for name in damaged:
        replace(folder / name, before[name].replace(b"e", b"f", 1))
    assert sorted(findings(folder, capsys)) == [("damaged", name) for name in sorted(damaged)]
    for name in damaged:
        (folder / name).unlink()
    extraction.extract(extraction_run(whole, folder))
    assert findings(folder, capsys) == []
    assert contents(folder) == before


# Other damage to a dataset


def test_swapped_shards(split: Path, capsys: pytest.CaptureFixture[str]):
    one, two = split / "shard-00000.tar", split / "shard-00001.tar"
    one.rename(split / "x")
    two.rename(one)
    (split / "x").rename(two)
    assert findings(split, capsys) == [("damaged", "shard-00000.tar"), ("damaged", "shard-00001.tar")]
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        read_dataset(split.parent)


@pytest.mark.parametrize("name", ["shard-00001.tar", "index.parquet", "quarantine.parquet", "manifest.json"])
def test_missing_files_of_a_dataset(split: Path, capsys: pytest.CaptureFixture[str], name: str):
    right = read_dataset(split.parent)
    (split / name).unlink()
    assert findings(split, capsys) == [("missing", name)]
    assert not wrong(lambda: read_dataset(split.parent), right, name)


def test_a_split_that_is_not_finished(split: Path, capsys: pytest.CaptureFixture[str]):
    """As a killed job leaves it: shards and nothing else, beside another split or given itself."""
    shutil.copytree(split, split.parent / "val")
    edit(split.parent / "val/manifest.json", lambda manifest: manifest.update(split="val"))
    for name in ("manifest.json", "index.parquet", "quarantine.parquet"):
        (split / name).unlink()
    assert findings(split.parent, capsys) == [("missing", "test/manifest.json")]
    with pytest.raises(ValueError, match="1 finding"):
        verify(run_of(split))
    assert "unfinished, 2 shards are there; run jobs/make_shards.py again" in capsys.readouterr().out


def test_extra_shards(split: Path, capsys: pytest.CaptureFixture[str]):
    right = read_dataset(split.parent)
    for name in ("shard-00002.tar", "backup.tar"):
        shutil.copy(split / "shard-00000.tar", split / name)
    assert findings(split, capsys) == [("extra", "backup.tar"), ("extra", "shard-00002.tar")]
    assert read_dataset(split.parent) == right


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of one field, given as ``shards.0.samples``; a callable value gets the old one."""

    def change(fields: Any) -> None:
        *above, last = [int(name) if name.isdigit() else name for name in path.split(".")]
        for name in above:
            fields = fields[name]
        new = value(fields[last]) if callable(value) else value
        assert new != fields[last]
        fields[last] = new

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2),
        ("kind", "tables"),
        ("split", "train"),
        ("frames", FRAMES - 1),
        ("height", 32),
        ("width", 32),
        ("channels", 1),
        ("codec", "npy"),
        ("clips", 5),
        ("preprocessing.frames", FRAMES - 1),
        ("preprocessing.size", 32),
        ("preprocessing.stride", 2),
        ("preprocessing.start", 1),
        ("preprocessing.hop", 7),
        ("balance.videos", 3),
        ("balance.read", 1),
        ("balance.quarantined", 1),
        ("balance.clips", 5),
        ("index.bytes", 7),
        ("index.sha256", "0" * 64),
        ("quarantine.rows", 1),
        ("quarantine.sha256", "0" * 64),
        ("shards.0.samples", 3),
        ("shards.0.bytes", 512),
        ("shards.0.sha256", "0" * 64),
        ("shards.0.name", "shard-00001.tar"),
        ("shards.1.name", "../shard-00001.tar"),
        ("shards", lambda shards: shards[::-1]),
        ("shards", lambda shards: shards[:1]),
        ("shards", []),
        ("shards.0", {}),
        ("balance", {}),
    ],
)
@pytest.mark.parametrize("seal", [True, False])
def test_an_edited_manifest(split: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, seal: bool):
    right = read_dataset(split.parent)
    edit(split / "manifest.json", set_in(field, value), seal)
    assert findings(split, capsys)
    assert not wrong(lambda: read_dataset(split.parent), right, "")


@pytest.mark.parametrize("field", ["frames", "height"])
def test_a_manifest_and_index_edited_together_meet_the_clips(
    split: Path, capsys: pytest.CaptureFixture[str], field: str
):
    """All that is recorded says the same wrong thing; the clips themselves say another."""
    rows = pq.read_table(split / "index.parquet")
    if field == "frames":
        rows = rows.set_column(
            rows.schema.names.index("frames"), rows.schema.field("frames"), pa.array([4] * 4, pa.int32())
        )
    replace_groups(split / "index.parquet", [rows.slice(0, 2), rows.slice(2, 2)])

    def change(manifest: dict[str, Any]) -> None:
        if field == "frames":
            manifest["frames"] = manifest["preprocessing"]["frames"] = 4
        else:
            manifest["height"] = manifest["width"] = manifest["preprocessing"]["size"] = 32
        manifest["index"] = entry_of(split / "index.parquet")

    edit(split / "manifest.json", change)
    assert findings(split, capsys) == [("damaged", "shard-00000.tar"), ("damaged", "shard-00001.tar")]
    with pytest.raises(ValueError, match=r"shard-00000\.tar: clip .* the manifest says"):
        read_dataset(split.parent)


def replace_groups(path: Path, groups: list[pa.Table]) -> None:
    path.unlink()
    with pq.ParquetWriter(path, groups[0].schema, compression="zstd", write_page_checksum=True) as writer:
        for group in groups:
            writer.write_table(group)


def entry_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": store.sha256_file(str(path))}


@pytest.mark.parametrize(
    ("column", "value", "where"),
    [
        ("key", "test-v00000-c0000", "index.parquet"),
        ("shard", "shard-00001.tar", "index.parquet"),
        ("stride", 3, "index.parquet"),
        ("start_frame", 51, "index.parquet"),
        ("frames", 4, "index.parquet"),
        ("source", "sim:balls-interaction/test/9", "quarantine.parquet"),
        ("source", "sim:balls-interaction/test/1", "shard-00000.tar"),
        ("start_frame", 100, "shard-00000.tar"),
        ("fps", 11.0, "shard-00000.tar"),
    ],
)
def test_an_edited_index_meets_the_manifest_and_the_clips(
    split: Path, capsys: pytest.CaptureFixture[str], column: str, value: Any, where: str
):
    rows = pq.read_table(split / "index.parquet")
    values = rows[column].to_pylist()
    values[1] = value
    number = rows.schema.names.index(column)
    rows = rows.set_column(number, rows.schema.field(column), pa.array(values, rows.schema.types[number]))
    replace_groups(split / "index.parquet", [rows.slice(0, 2), rows.slice(2, 2)])
    edit(split / "manifest.json", lambda manifest: manifest.update(index=entry_of(split / "index.parquet")))
    assert ("damaged", where) in findings(split, capsys)


def test_a_split_under_another_name(split: Path, capsys: pytest.CaptureFixture[str]):
    split.rename(split.parent / "train")
    assert findings(split.parent, capsys) == [("damaged", "train/manifest.json")]
    with pytest.raises(ValueError, match=r"train/manifest\.json .*it is of split 'test'"):
        open_source(str(split.parent), "train")


@pytest.mark.filterwarnings("ignore:Data type alias:DeprecationWarning")
def test_a_damaged_header_inside_a_sample_is_a_value_error():
    clip = Clip("k", np.zeros((2, 4, 4, 3), np.uint8), 1.0, 0, 1, "s", {"num_objects": np.array(3)})
    members = to_sample(clip, "npy")
    for bit in range(8 * 128):
        data = bytearray(members["num_objects.npy"])
        data[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ValueError):
            from_sample("k", {**members, "num_objects.npy": bytes(data)})


# Other damage to a run


LAST, FIRST = "checkpoints/step-00000002", "checkpoints/step-00000001"


def test_a_checkpoint_without_complete_that_counts(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    run = copy(toy_run)
    (run / LAST / "COMPLETE").unlink()
    assert findings(run, capsys, clean=True, min_age=0.0) == [("damaged", LAST)]
    with pytest.raises(ValueError, match=f"{LAST} is not complete"):
        checkpoint.load_last(str(run))
    shutil.rmtree(run / LAST)
    assert findings(run, capsys) == [("missing", LAST)]
    shutil.rmtree(run / FIRST)
    assert findings(run, capsys) == [("missing", FIRST), ("missing", LAST)]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "last.json",
        "metrics.jsonl",
        f"{LAST}/model.safetensors",
        f"{LAST}/optimizer.safetensors",
        f"{FIRST}/state.json",
    ],
)
def test_missing_files_of_a_run(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], name: str
):
    run = copy(toy_run)
    (run / name).unlink()
    assert findings(run, capsys) == [("missing", name)]


def rewrite_checkpoint(folder: Path, name: str, data: bytes) -> None:
    """Put other content into a checkpoint, and let COMPLETE say so."""
    replace(folder / name, data)
    edit(folder / "COMPLETE", lambda complete: complete.update({name: entry_of(folder / name)}))


def test_weights_that_are_not_finite(toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    from safetensors.torch import load, save

    run = copy(toy_run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load((toy_run / LAST / name).read_bytes())
        next(tensor for tensor in tensors.values() if tensor.ndim).view(-1)[3] = float("nan")
        rewrite_checkpoint(run / LAST, name, save(tensors))
    places = [f"{LAST}/model.safetensors", f"{LAST}/optimizer.safetensors"]
    assert findings(run, capsys) == [("damaged", place) for place in places]


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("step", 1, "state.json"),
        ("family", "unknown", "state.json"),
        ("schema", 9, "state.json"),
        ("run.seed", 1, "state.json"),
        ("optimizer.groups.0.params", 3, "optimizer.safetensors"),
        ("run.model.size", 7, "model.safetensors"),
    ],
)
def test_a_state_that_does_not_fit_its_run(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], field: str, value: Any, place: str
):
    run = copy(toy_run)
    state = json.loads((run / LAST / "state.json").read_bytes())
    set_in(field, value)(state)
    rewrite_checkpoint(run / LAST, "state.json", store.json_bytes(state))
    assert ("damaged", f"{LAST}/{place}") in findings(run, capsys)


def test_a_checkpoint_of_another_config(toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_toy_run(tmp_path / "run")
    write_toy_run(tmp_path / "other/run", seed=5, out=str(tmp_path / "run"), steps=9)
    shutil.rmtree(tmp_path / "run" / LAST)
    shutil.move(tmp_path / "other/run" / LAST, tmp_path / "run" / LAST)
    capsys.readouterr()
    with pytest.raises(ValueError, match="1 finding"):
        verify(run_of(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "state.json: is of a run with other settings than config.json: run.seed is 5 and was 0;" in out
    assert "steps" not in out


def test_a_renamed_checkpoint(toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    run = copy(toy_run)
    (run / FIRST).rename(run / "x")
    (run / LAST).rename(run / FIRST)
    (run / "x").rename(run / LAST)
    assert findings(run, capsys) == [("damaged", f"{FIRST}/state.json"), ("damaged", f"{LAST}/state.json")]
    for read in (checkpoint.load_last, checkpoint.load_model):
        with pytest.raises(ValueError, match=r"step-00000002/state\.json .*it is of step 1"):
            read(str(run))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"step": 1}\n{"step"\n{"step": 2}\n', "line 2 is no line of metrics"),
        (b'{"step": 2}\n{"step": 1}\n', "line 2 is of step 1 and comes after step 2"),
        (b'{"step": 1.5}\n', "line 1"),
        (b"[]\n", "line 1"),
        (b"\xff\n", "line 1"),
    ],
)
def test_metrics_that_are_none(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], text: bytes, says: str
):
    run = copy(toy_run)
    replace(run / "metrics.jsonl", text)
    with pytest.raises(ValueError, match="1 finding"):
        verify(run_of(run))
    assert f"damaged   metrics.jsonl: {says}" in capsys.readouterr().out


def test_a_half_written_last_line_is_a_note(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    run = copy(toy_run)
    replace(run / "metrics.jsonl", b'{"step": 1}\n{"step": 2}\n{"st')
    assert verify(run_of(run)).startswith("ok: ")
    assert "note      metrics.jsonl: the last line is half-written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1},
        {"checkpoint": None},
        {"checkpoint": "checkpoints/../x"},
        {"best": "checkpoints/step-00000009"},
        {"checkpoint": "checkpoints/step-00000009", "step": 9},
    ],
)
def test_a_last_json_that_was_edited_and_sealed(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], change: dict[str, Any]
):
    run = copy(toy_run)
    edit(run / "last.json", lambda last: last.update(change))
    assert len(findings(run, capsys)) == 1


def test_a_run_that_was_just_begun_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store.publish_json(str(tmp_path / "config.json"), {"family": "ddlp", "run": {}})
    assert verify(run_of(tmp_path)).startswith("ok: ")
    assert "checkpoints: there is none yet" in capsys.readouterr().out


def test_a_checkpoint_that_training_retires_meanwhile_is_no_damage(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = copy(toy_run)
    edit(run / "last.json", lambda last: last.update(best=None))

    def retired(path: str) -> Any:
        if path.endswith(FIRST):
            shutil.rmtree(path)
        return verify_checkpoint(path)

    monkeypatch.setattr(module, "verify_checkpoint", retired)
    assert verify(run_of(run)).startswith("ok: ")
    assert f"note      {FIRST}: retired by its training" in capsys.readouterr().out


# Other damage to tables


READERS: dict[str, Callable[[str], Any]] = {
    "objects": lambda folder: tables.read_objects(folder, ["frame"]),
    "frames": lambda folder: tables.read_frames(folder, ["frame"]),
    "clips": tables.load_clips,
    "dataset": lambda folder: list(tables.ClipDataset(folder)),
}


def rewrite_part(folder: Path, name: str, change: Callable[[str, pa.Table], pa.Table | None], **record: Any) -> None:
    """Write rows of a part anew as if they had been extracted so, with record and manifest to match."""
    path = folder / f"parts/{name}.json"
    entry = store.read_json(str(path)) | record
    for table in ("objects", "frames"):
        part = folder / table / f"{name}.parquet"
        rows = change(table, tables.read_part(str(part)))
        if rows is not None:
            part.unlink()
            entry[table] = tables.publish(rows, str(part))
    replace(path, store.sealed_json(entry))

    def listed(manifest: dict[str, Any]) -> None:
        manifest["parts"] = [entry if part["name"] == name else part for part in manifest["parts"]]
        manifest["rows"] = {t: sum(part[t]["rows"] for part in manifest["parts"]) for t in ("objects", "frames")}
        manifest["rows"]["clips"] = sum(part["clips"] for part in manifest["parts"])

    edit(folder / "manifest.json", listed)


def set_column(rows: pa.Table, name: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    number = rows.schema.names.index(name)
    values = pa.array(change(rows[name].to_pylist()), rows.schema.types[number])
    return rows.set_column(number, rows.schema.field(name), values)


PART = "shard-00001"


def first_set(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    """An edit of a column's first value."""
    return lambda rows: set_column(rows, name, lambda values: [value, *values[1:]])


def of_frames(rows: pa.Table) -> pa.Table:
    text = rows.schema.metadata[b"objdyn"].replace(b'"table": "objects"', b'"table": "frames"')
    return rows.replace_schema_metadata({b"objdyn": text})


@pytest.mark.parametrize(
    ("place", "change"),
    [
        pytest.param("objects", lambda r: pa.concat_tables([r.slice(0, 1), r]), id="a row twice"),
        pytest.param("objects", lambda r: r.slice(0, r.num_rows - 1), id="a row missing"),
        pytest.param("objects", lambda r: r.take(pa.array(range(r.num_rows)[::-1])), id="out of order"),
        pytest.param("objects", first_set("source_frame", 7), id="source_frame that differs"),
        pytest.param("objects", first_set("depth", float("nan")), id="not finite and not counted"),
        pytest.param("objects", lambda r: r.drop_columns(["depth"]), id="a column gone"),
        pytest.param("objects", lambda r: r.drop_columns(["sample"]), id="a key column gone"),
        pytest.param("objects", lambda r: r.replace_schema_metadata({}), id="no metadata"),
        pytest.param("objects", of_frames, id="metadata of the other table"),
        pytest.param("frames", lambda r: r.slice(1), id="a frame missing"),
        pytest.param("frames", first_set("source_frame", 7), id="source_frame that differs in frames"),
        pytest.param("frames", lambda r: set_column(r, "kind", lambda v: [k + "x" for k in v]), id="unknown kind"),
        pytest.param("frames", lambda r: set_column(r, "context", lambda v: [c and 1 for c in v]), id="other context"),
    ],
)
def test_rows_that_contradict_the_settings_or_each_other(
    whole: Path,
    copy: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
    place: str,
    change: Callable[[pa.Table], pa.Table],
):
    folder = copy(whole / "tables")
    rewrite_part(folder, PART, lambda table, rows: change(rows) if table == place else None)
    kinds = {path.partition("/")[0] for kind, path in findings(folder, capsys) if kind == "damaged"}
    assert kinds & {place, "objects"}


@pytest.mark.parametrize(
    ("closing", "spans", "finding"),
    [
        (2, {"posterior": (0, 9), "interpolated": (3, 4)}, None),
        (2, {"posterior": (0, 9), "interpolated": (3, 3)}, r"interpolated .* \[\[3, 3, 3\]\], wanted \[\[3, 3, 4\]\]"),
        (2, {"posterior": (0, 9)}, r"interpolated rows .* \[\], wanted \[\[3, 3, 4\]\]"),
        (None, {"posterior": (0, 9), "interpolated": (3, 4)}, r"\[\[3, 3, 4\]\], wanted \[\]"),
    ],
)
def test_interpolated_rows_are_of_the_gap_that_the_settings_leave(
    closing: int | None, spans: dict[str, tuple[int, int]], finding: str | None
):
    frames = {kind: np.arange(first, first + count) for kind, (first, count) in spans.items()}
    blocks = [
        tables.Block("clip", kind, frame, frame, {}, context=0 if kind == "posterior" else 3)
        for kind, frame in frames.items()
    ]
    rows = tables.build("frames", blocks, (), tables.Provenance("ssm", "m", "d", "test", True, 3, None, closing))
    settings = {"context": 3, "horizon": None, "closing": closing}
    with contextlib.nullcontext() if finding is None else pytest.raises(FaultError, match=finding):
        module._check_frames(rows, settings)


def test_a_part_of_another_model(whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    folder = copy(whole / "tables")
    model = store.read_json(str(folder / "settings.json"))["model_id"].encode()

    def other(table: str, rows: pa.Table) -> pa.Table:
        text = rows.schema.metadata[b"objdyn"].replace(model, b"f" * 64)
        return rows.replace_schema_metadata({b"objdyn": text})

    rewrite_part(folder, PART, other)
    assert findings(folder, capsys) == [("damaged", f"{t}/{PART}.parquet") for t in ("objects", "frames")]
    for read in READERS.values():
        with pytest.raises(ValueError, match=rf"{PART}\.parquet .*model_id"):
            read(str(folder))


def test_a_clip_in_two_parts(whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    folder = copy(whole / "tables")
    first = tables.read_frames(str(folder))["clip"][0].as_py()

    def renamed(table: str, rows: pa.Table) -> pa.Table:
        lowest = min(rows["clip"].to_pylist())
        return set_column(rows, "clip", lambda clips: [first if clip == lowest else clip for clip in clips])

    rewrite_part(folder, PART, renamed)
    assert findings(folder, capsys) == [("damaged", f"parts/{PART}.json")]
    for read in READERS.values():
        with pytest.raises(ValueError, match=rf"{PART}.*{first}|{first}.*{PART}"):
            read(str(folder))


@pytest.mark.parametrize(
    "name", ["settings.json", f"parts/{PART}.json", f"objects/{PART}.parquet", f"frames/{PART}.parquet"]
)
def test_missing_files_of_finished_tables(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], name: str
):
    folder = copy(whole / "tables")
    (folder / name).unlink()
    assert findings(folder, capsys) == [("missing", name)]
    if name.startswith(("objects", "frames")):
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            READERS[name.partition("/")[0]](str(folder))


def test_unfinished_tables(whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    folder = copy(whole / "tables")
    (folder / "manifest.json").unlink()
    (folder / f"parts/{PART}.json").unlink()
    left = [("leftover", f"{table}/{PART}.parquet") for table in ("frames", "objects")]
    assert findings(folder, capsys) == [("missing", "manifest.json"), *left]
    with pytest.raises(ValueError, match="3 findings"):
        verify(run_of(folder))
    assert "unfinished: 1 parts are done; run jobs/extract.py again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("settings.json", "model_id", "f" * 64),
        ("settings.json", "kind", "dataset"),
        ("manifest.json", "dataset_id", "f" * 64),
        ("manifest.json", "rows.clips", 9),
        ("manifest.json", "parts.0.clips", 1),
        ("manifest.json", "parts.0.objects.rows", 1),
        ("manifest.json", "parts", lambda parts: parts[:1]),
        ("manifest.json", "parts.1.name", "shard-00000"),
        (f"parts/{PART}.json", "clips", 9),
        (f"parts/{PART}.json", "clips_not_finite", 1),
        (f"parts/{PART}.json", "frames.sha256", "f" * 64),
        (f"parts/{PART}.json", "name", "shard-00000"),
    ],
)
def test_edited_and_sealed_json_of_tables(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], name: str, field: str, value: Any
):
    folder = copy(whole / "tables")
    edit(folder / name, set_in(field, value))
    assert findings(folder, capsys)


def test_a_record_that_counts_wrongly_in_an_unfinished_folder(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    for count in ("clips", "clips_not_finite"):
        folder = copy(whole / "tables")
        edit(folder / f"parts/{PART}.json", set_in(count, 1))
        (folder / "manifest.json").unlink()
        assert findings(folder, capsys) == [("missing", "manifest.json"), ("damaged", f"objects/{PART}.parquet")]
        shutil.rmtree(folder)


def test_extra_parts(whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]):
    folder = copy(whole / "tables")
    names = [f"frames/{PART}.parquet", f"objects/{PART}.parquet", f"parts/{PART}.json"]
    for name in names:
        shutil.copy(folder / name, folder / name.replace(PART, "shard-00007"))
    shutil.copy(folder / names[0], folder / "frames/mine.parquet")
    shutil.copy(folder / names[0], folder / "export.parquet")
    extra = ["frames/mine.parquet", *(name.replace(PART, "shard-00007") for name in names)]
    assert findings(folder, capsys) == [("extra", name) for name in extra]
    assert findings(folder, capsys, clean=True, min_age=0.0) == [("extra", "frames/mine.parquet")]
    assert (folder / "export.parquet").exists()


# Cleaning


def make_old(*paths: Path, minutes: float = 300.0) -> None:
    when = time.time() - 60 * minutes
    for path in paths:
        for each in (path, *path.rglob("*")):
            os.utime(each, (when, when))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clean_removes_leftovers_and_only_those(
    whole: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for folder in (whole / "data", toy_run, whole / "tables"):
        shutil.copytree(folder, tmp_path / folder.name)
    notes = [tmp_path / "notes.txt", tmp_path / "data/test/notes.txt", tmp_path / "run/checkpoints/mine/x.tmp"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = contents(tmp_path)
    temporary = f".shard-00000.tar.{'0a' * 16}.tmp"
    leftovers = [
        f"data/test/{temporary}",
        "data/test/shard-00009.tar",
        f"data/test/.objdyn-probe-{'0a' * 16}",
        f"run/{temporary}",
        f"run/{LAST}/{temporary}",
        "run/checkpoints/step-00000003/model.safetensors",
        "run/.ray/a/b",
        f"tables/objects/{temporary}",
        "tables/frames/shard-00009.parquet",
        "tables/parts/shard-00009.json",
    ]
    for name in leftovers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"left")
    assert len(findings(tmp_path, capsys)) == len(leftovers)
    assert len(findings(tmp_path, capsys, clean=True)) == len(leftovers)  # all are too young
    make_old(tmp_path)
    make_old(tmp_path / "tables/objects" / temporary, minutes=99)
    capsys.readouterr()
    with pytest.raises(ValueError, match="1 finding"):
        verify(run_of(tmp_path, clean=True))
    out = capsys.readouterr().out
    assert "kept: changed 1h39m ago, which is less than --min-age 180 minutes" in out
    assert out.count("removed   ") == len(leftovers) - 1
    assert verify(run_of(tmp_path, clean=True, min_age=90.0)).startswith("ok: ")
    assert contents(tmp_path) == before
    assert not (tmp_path / "run/checkpoints/step-00000003").exists()


def test_clean_keeps_damaged_files_that_are_listed(split: Path, capsys: pytest.CaptureFixture[str]):
    replace(split / "shard-00001.tar", b"half")
    make_old(split)
    assert findings(split, capsys, clean=True) == [("damaged", "shard-00001.tar")]
    assert (split / "shard-00001.tar").read_bytes() == b"half"


@pytest.mark.parametrize("manifest", [None, b"{"])
def test_clean_keeps_shards_and_parts_while_no_manifest_says_what_counts(
    split: Path, whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], manifest: bytes | None
):
    folder = copy(whole / "tables")
    for path in (split, folder):
        replace(path / "manifest.json", manifest) if manifest else (path / "manifest.json").unlink()
        make_old(path)
        before = contents(path)
        assert len(findings(path, capsys, clean=True)) == 1
        assert contents(path) == before


def test_clean_keeps_checkpoints_while_last_json_is_damaged(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    run = copy(toy_run)
    (run / LAST / "COMPLETE").unlink()
    replace(run / "last.json", b"{")
    make_old(run)
    assert findings(run, capsys, clean=True) == [("damaged", "last.json"), ("leftover", LAST)]
    assert (run / LAST / "model.safetensors").exists()


def test_clean_leaves_ray_alone_while_the_run_is_training(
    toy_run: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
):
    run = copy(toy_run)
    (run / ".ray").mkdir()
    make_old(run / ".ray")
    replace(run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes())
    assert findings(run, capsys, clean=True) == [("leftover", ".ray")]
    make_old(run)
    assert findings(run, capsys, clean=True) == []
    assert not (run / ".ray").exists()


def test_links_are_followed_and_broken_ones_are_missing(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Folders are often links to another disk."""
    (tmp_path / "linked").symlink_to(split.parent)
    assert verify(run_of(tmp_path / "linked")).startswith("ok: dataset")
    (split / "shard-00001.tar").rename(tmp_path / "elsewhere.tar")
    (split / "shard-00001.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert findings(split, capsys) == []
    (tmp_path / "elsewhere.tar").unlink()
    assert findings(split, capsys) == [("missing", "shard-00001.tar")]


def test_names_cannot_forge_a_line(split: Path, capsys: pytest.CaptureFixture[str]):
    (split / "x\nok: all is well.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="1 finding"):
        verify(run_of(split))
    assert capsys.readouterr().out.startswith(r"extra     x\nok: all is well.tar: 0 bytes")


# Object storage


def test_object_storage_is_verified_and_cleaned(
    whole: Path, toy_run: Path, s3_folder: str, capsys: pytest.CaptureFixture[str]
):
    for folder in (whole / "data/test", toy_run, whole / "tables"):
        for path in folder.rglob("*"):
            if path.is_file():
                store.publish(store.join(s3_folder, folder.name, *path.relative_to(folder).parts), path.read_bytes())
    line = verify(run_of(s3_folder))
    assert all(text in line for text in (" test: 2 shards", "run run: 2 checkpoints", "tables tables: 2 parts"))
    extras = [
        "run/checkpoints/step-00000003/model.safetensors",
        "tables/frames/shard-00007.parquet",
        "test/shard-00007.tar",
    ]
    for name in extras:
        store.publish(f"{s3_folder}/{name}", b"left")
    bucket, _, prefix = s3_folder.removeprefix("s3://").partition("/")
    key = f"{prefix}/test/shard-00003.tar"
    store.filesystem().call_s3("create_multipart_upload", Bucket=bucket, Key=key)  # and here its writer was killed
    data = bytearray((whole / "data/test/shard-00001.tar").read_bytes())
    data[700] ^= 1
    store.publish(f"{s3_folder}/test/shard-00001.tar", bytes(data))
    store.remove(f"{s3_folder}/test/quarantine.parquet")
    wrong = [("missing", "test/quarantine.parquet"), ("damaged", "test/shard-00001.tar")]
    (upload,) = store.unfinished(s3_folder)
    with pytest.MonkeyPatch.context() as patch:  # the server of the tests says of each upload that it is years old
        patch.setattr(store, "unfinished", lambda folder: [upload._replace(begun=time.time())])
        found = findings(s3_folder, capsys, clean=True)
    assert len(found) == 6
    assert ("leftover", "test/shard-00003.tar") in found
    assert store.unfinished(s3_folder) == [upload]
    assert all(store.exists(f"{s3_folder}/{name}") for name in extras)
    assert findings(s3_folder, capsys, clean=True, min_age=0.0) == wrong
    assert not any(store.exists(f"{s3_folder}/{name}") for name in extras)
    assert store.unfinished(s3_folder) == []
    with pytest.raises(ValueError, match="does not exist"):
        verify(run_of(f"{s3_folder}/nothing"))


def test_nothing_was_read_silently():
    """The table of what was injected above; ``pytest -s`` shows it."""
    lines = [f"{name:46}{n:>9}{found:>7}{silent:>8}" for name, (n, found, silent) in TALLY.items()]
    total = [sum(column) for column in zip(*TALLY.values(), strict=True)] if TALLY else [0, 0, 0]
    heads = f"{'damage':46}{'injected':>9}{'found':>7}{'silent':>8}"
    print("\n".join(["", heads, *lines, f"{'together':46}{total[0]:>9}{total[1]:>7}{total[2]:>8}"]))
    assert total[0] == total[1]
    assert total[2] == 0


@pytest.mark.parametrize("below", ["", "shared"])
def test_clean_leaves_parquet_alone_that_somebody_copied_without_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    for name in ("objects/shard-00000.parquet", "frames/shard-00000.parquet"):
        (tmp_path / below / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / below / name).write_bytes(b"not ours to judge")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=str(tmp_path)):
        verify(run_of(tmp_path, clean=True, min_age=0.0))
    assert sorted(tmp_path.rglob("*")) == before
    assert "removed" not in capsys.readouterr().out


def test_clean_leaves_checkpoints_of_another_program_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "checkpoints/step-00001000/weights.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="findings"):
        verify(run_of(tmp_path, clean=True, min_age=0.0))
    assert weights.read_bytes() == b"somebody's"
    assert "removed" not in capsys.readouterr().out


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "there").symlink_to(".")
    assert store.list_folder(str(tmp_path))["self"].is_folder is False
    folder = module.Folder(str(tmp_path), "run", store.list_folder(str(tmp_path)))
    assert 0 <= module._ages(folder)(str(tmp_path)) < 3600


# Sweeps


@pytest.fixture
def sweep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two trials, one trained and one failed, as a sweep leaves them."""
    import ray.tune

    from pipeline import space, sweep_report, tune
    from pipeline.study import SweepStudy

    preset = PRESETS["iodine"]["debug"]
    words = space.parse_space(["optim.lr=log:1e-4:1e-3"], preset)
    objectives = (space.Objective("recon_psnr", "maximize"),)
    plan = {"preset": "iodine/debug", "data": preset.data, "dataset_id": "d", "settings": {}, "sampler": "random",
            "pruner": "none", "seed": 0, "seeds": 1}  # fmt: skip
    out = str(tmp_path / "sweep")
    os.makedirs(out)
    study = SweepStudy.open(
        f"sqlite:///{out}/study.db", "sweep", plan=plan, space=words, objectives=objectives, wanted=2, resume=False
    )
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", told.append)
    number, settings = study.ask()
    run = dataclasses.replace(preset, steps=2, eval_every=2, device="cpu", threads=1)
    config = {"number": number, "settings": json.dumps(settings)}
    tune.train_trial(config, tune.Job(run, out, objectives, 1, separate=False))
    study.attach_picture(number, out, told[-1]["picture"])
    study.complete(number, json.loads(told[-1]["seed_values"]), told[-1]["seconds"])
    study.fail(study.ask()[0], "it cannot be")
    record = study.record()
    sweep_report.write_sweep(out, record, tune._best_run(out, record, preset))
    return tmp_path / "sweep"


def test_sweep_is_read_with_the_runs_of_its_trials(sweep_folder: Path) -> None:
    told = verify(VerifyRun(str(sweep_folder)))
    assert "sweep sweep: 1 complete, 1 failed trials" in told
    assert "run seed-0: 1 checkpoints, the newest of step 2" in told
    assert "sweep sweep" in verify(VerifyRun(str(sweep_folder.parent)))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda f: (f / "sweep.json").write_bytes((f / "sweep.json").read_bytes().replace(b"iodine", b"iodene")),
         "damaged sweep.json"),
        (lambda f: os.remove(f / "sweep.parquet"), "missing sweep.parquet"),
        (lambda f: pq.write_table(pq.read_table(f / "sweep.parquet").slice(1), f / "sweep.parquet"),
         "damaged sweep.parquet"),
        (lambda f: os.remove(f / "best.json"), "missing best.json"),
        (lambda f: os.remove(f / "report.html"), "missing report.html"),
        (lambda f: os.remove(f / "trials/0000/clip.png"), "missing trials/0000/clip.png"),
        (lambda f: shutil.rmtree(f / "trials/0000/seed-0"), "missing trials/0000/seed-0"),
        (lambda f: (f / "trials/0000/seed-0/checkpoints/step-00000002/model.safetensors").write_bytes(b"x"),
         "damaged .*model.safetensors"),
    ],
)  # fmt: skip
def test_damage_of_a_sweep_is_found(
    sweep_folder: Path, damage: Callable[[Path], Any], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(sweep_folder)
    with pytest.raises(ValueError, match="1 finding"):
        verify(VerifyRun(str(sweep_folder)))
    kind, name = found.split()
    text = capsys.readouterr()

    assert re.search(rf"{kind}.*{name}", text.out + text.err)
