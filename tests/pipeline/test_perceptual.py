import dataclasses
import functools
import os
import resource
import runpy
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from objdyn import families
from objdyn.clips import collate, to_model_input
from objdyn.layers.perceptual import Network, Trunk
from objdyn.metrics.perceptual import CHANNELS
from pipeline import checkpoint, doctor, loop, perceptual, store
from pipeline.config import DoctorRun, FetchWeightsRun, TrainRun, with_overrides
from pipeline.perceptual import (
    METADATA,
    SOURCES,
    Source,
    Sources,
    digest,
    fetch_weights,
    note_on,
    open_distance,
    read_weights,
    require,
)
from pipeline.presets import PRESETS
from pipeline.reader import iter_clips, open_source

VGG = with_overrides(
    PRESETS["ddlp"]["debug-vgg"],
    {"optim.batch_size": 1, "threads": 1, "steps": 2, "checkpoint_every": 1, "log_every": 1, "eval_every": 0,
     "clip_frames": 3, "model.warmup_steps": 1, "device": "cpu"},
)  # fmt: skip


def trunk_of(network: Network, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(Trunk(network).state_dict())


def heads_of(network: Network) -> dict[str, Tensor]:
    counts, generator = CHANNELS[network], torch.Generator().manual_seed(0)
    return {f"heads.{i}.weight": torch.rand(1, count, 1, 1, generator=generator) for i, count in enumerate(counts)}


def saved(path: Path, tensors: Mapping[str, Tensor], **claims: Any) -> str:
    save_file(dict(tensors), path, {METADATA: store.json_bytes(claims).decode()} if claims else None)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files with random weights of the right shapes."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        "vgg": saved(folder / "vgg.safetensors", trunk_of("vgg16")),
        "other": saved(folder / "other.safetensors", trunk_of("vgg16", seed=1)),
        "alex": saved(folder / "alex.safetensors", trunk_of("alexnet") | heads_of("alexnet")),
        "heads": saved(folder / "heads.safetensors", heads_of("vgg16")),
    }


# ---- files -------------------------------------------------------------------------------------------------------


def test_trunk_and_heads_may_come_in_one_file_or_in_two(files: dict[str, str]) -> None:
    read = read_weights([files["heads"], files["alex"], files["vgg"]])
    assert set(read) == {"vgg16", "alexnet"}
    vgg, alex = read["vgg16"], read["alexnet"]
    assert vgg.trunk is not None
    assert alex.trunk is not None
    assert (len(vgg.heads), len(alex.heads)) == (5, 5)
    assert vgg.record == {
        "network": "vgg16",
        "trunk_sha256": digest(trunk_of("vgg16")),
        "heads_sha256": digest(heads_of("vgg16")),
        "published": False,
        "files": {
            "heads.safetensors": store.sha256_file(files["heads"]),
            "vgg.safetensors": store.sha256_file(files["vgg"]),
        },
    }
    assert read_weights([files["vgg"]])["vgg16"].heads == ()


def test_the_digest_is_of_names_shapes_types_and_values_alone() -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2)}
    assert digest(tensors) == digest({"a": torch.ones(2), "b": torch.arange(6.0).view(3, 2).contiguous().view(2, 3)})
    others = [tensors | {"a": torch.zeros(2)}, tensors | {"a": torch.ones(2, 1)}, tensors | {"a": torch.ones(2).half()}]
    assert digest(tensors) not in {digest(other) for other in others}
    transposed = torch.arange(6.0).view(3, 2).t()
    assert digest({"a": transposed}) == digest({"a": transposed.contiguous()})


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_the_published_files_are_known(network: Network, shared: Path) -> None:
    paths = [
        shared / "weights" / name for name in (f"{network}_features.safetensors", f"lpips_{network}_heads.safetensors")
    ]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"needs the weights of {network}")
    found = read_weights([str(path) for path in paths])[network]
    assert found.record["published"] is True
    assert found.record["trunk_sha256"] == SOURCES[network].trunk.tensors_sha256
    assert found.record["heads_sha256"] == SOURCES[network].heads.tensors_sha256


def test_a_file_that_is_not_what_its_name_or_metadata_says_is_refused(tmp_path: Path) -> None:
    tensors = heads_of("vgg16")
    named = saved(tmp_path / "lpips_vgg16_heads.safetensors", tensors)
    with pytest.raises(ValueError, match=r"file of this name has SHA-256 a46d7602.*fetch it again"):
        read_weights([named])
    claimed = saved(tmp_path / "claimed.safetensors", tensors, network="vgg16", heads_sha256=digest(tensors))
    assert read_weights([claimed])["vgg16"].heads
    changed = saved(tmp_path / "changed.safetensors", tensors, network="vgg16", heads_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"metadata says heads_sha256 000.*damaged or was edited"):
        read_weights([changed])
    wrong = saved(tmp_path / "wrong.safetensors", tensors, network="alexnet")
    with pytest.raises(ValueError, match="metadata says network alexnet, but what it holds has vgg16"):
        read_weights([wrong])
    without = saved(tmp_path / "without.safetensors", tensors, network="vgg16", trunk_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"trunk_sha256 0+, but what it holds has None"):
        read_weights([without])


def test_broken_files_are_refused_with_their_names(tmp_path: Path, files: dict[str, str]) -> None:
    def refused(path: Path | str, words: str, *more: str) -> None:
        with pytest.raises(ValueError, match=words) as found:
            read_weights([*more, str(path)])
        assert str(path) in str(found.value)

    refused(tmp_path / "nothing", "there is no such file.*fetch_weights.py")
    refused(tmp_path, "there is no such file")
    (tmp_path / "vgg.pth").write_bytes(b"PK\x03\x04 and so on, as torch.save writes")
    refused(tmp_path / "vgg.pth", "a PyTorch file .*jobs/fetch_weights.py")
    whole = Path(files["heads"]).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    refused(tmp_path / "cut.safetensors", "not a safetensors file, or damaged")
    refused(
        saved(tmp_path / "else.safetensors", {"weight": torch.ones(2)}), "neither a trunk .* nor heads .* but weight"
    )
    few = {name: tensor for name, tensor in heads_of("vgg16").items() if name != "heads.2.weight"}
    refused(saved(tmp_path / "few.safetensors", few), r"heads of \(64, 128, 0, 512, 512\) channels")
    nan = heads_of("vgg16") | {"heads.1.weight": torch.full((1, 128, 1, 1), torch.nan)}
    refused(saved(tmp_path / "nan.safetensors", nan), "head 1 of LPIPS by vgg16 holds values .* not finite")
    refused(saved(tmp_path / "mixed.safetensors", trunk_of("alexnet") | heads_of("vgg16")), "heads of LPIPS by alexnet")
    refused(files["other"], "a part of vgg16 that another file holds", files["vgg"])


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["obj3d", "obj3d128", "clevrer", "traffic", "debug-vgg"])
def test_presets_with_the_perceptual_loss_ask_for_weights(preset: str) -> None:
    run = PRESETS["ddlp"][preset]
    assert vars(run.model)["recon_loss"] == "vgg"
    with pytest.raises(ValueError, match=r"needs the weights of VGG16: .*fetch_weights.py.*--perceptual-weights"):
        require(run)


def test_weights_that_no_stage_uses_are_refused_and_one_stage_is_enough() -> None:
    run = dataclasses.replace(PRESETS["ddlp"]["debug"], perceptual_weights=("/w",))
    with pytest.raises(ValueError, match="the model does not train with them"):
        require(run)
    require(dataclasses.replace(run, stages=("steps=2", "model.recon_loss=vgg")))
    require(PRESETS["ddlp"]["balls"])


def test_a_run_needs_the_trunk_of_vgg16(files: dict[str, str]) -> None:
    assert open_distance(PRESETS["ddlp"]["debug"]) is None
    for names, held in ((["alex"], "trunk of alexnet"), (["heads"], "heads of vgg16")):
        run = dataclasses.replace(VGG, perceptual_weights=tuple(files[name] for name in names))
        with pytest.raises(ValueError, match=f"holds the {held}, but model.recon_loss=vgg needs the trunk of VGG16"):
            open_distance(run)


def test_without_weights_the_job_ends_within_5_seconds_with_the_command(repository: Path, tmp_path: Path) -> None:
    words = ["debug-vgg", "--out", str(tmp_path / "run")]
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(repository / "jobs" / "train_ddlp.py"), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository)},
        check=False,
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1
    assert done.stderr.startswith("error: model.recon_loss=vgg needs the weights of VGG16")
    assert "python jobs/fetch_weights.py --network vgg16 --out ~/weights/vgg16.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1  # nothing was started
    assert not (tmp_path / "run").exists()
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    assert seconds < 5  # of a core: nothing is waited for


def trained(folder: Path, *paths: str, **changes: Any) -> TrainRun:
    run = with_overrides(dataclasses.replace(VGG, out=str(folder), perceptual_weights=paths), changes)
    run = loop.open_run(run)
    loop.train(run)
    return run


@pytest.fixture(scope="module")
def run_folder(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    trained(folder, files["vgg"])
    return folder


def test_a_debug_run_trains_with_the_perceptual_loss_and_records_its_weights(
    run_folder: Path, files: dict[str, str]
) -> None:
    first, second = loop.read_metrics(str(run_folder))
    assert all(line["recon"] > 0 for line in (first, second))
    for line in (first, second):
        total = 1e-3 * (line["recon"] + 40 * (line["kl_static"] + line["kl_dynamic"]))
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    record = {
        "network": "vgg16",
        "trunk_sha256": digest(trunk_of("vgg16")),
        "published": False,
        "files": {"vgg.safetensors": store.sha256_file(files["vgg"])},
    }
    assert store.read_json(str(run_folder / "config.json"))["perceptual"] == record
    weights = checkpoint.load_weights(str(run_folder))
    assert weights.state["perceptual"] == record
    assert not any("features.0" in name for name in weights.tensors)
    model = checkpoint.load_model(str(run_folder)).model
    with torch.no_grad():
        model.decode(model.encode(torch.rand(1, 3, 3, 64, 64)))  # works without the weights


def test_a_resumed_run_has_the_same_weights_wherever_they_are(
    run_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    again = {"resume": True, "steps": 3}
    with pytest.raises(ValueError, match=r"perceptual\.trunk_sha256 was .* and is"):
        trained(run_folder, files["other"], **again)
    moved = saved(tmp_path / "moved.safetensors", trunk_of("vgg16") | heads_of("vgg16"))
    trained(run_folder, moved, **again)
    assert checkpoint.last_step(str(run_folder)) == 3


def test_weights_that_change_after_a_run_was_opened_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.safetensors", trunk_of("vgg16"))
    run = dataclasses.replace(VGG, out=str(tmp_path / "run"), perceptual_weights=(path,))
    run = loop.open_run(run)
    saved(tmp_path / "weights.safetensors", trunk_of("vgg16", seed=1))
    with pytest.raises(ValueError, match=r"weights.safetensors has changed since .*run was opened"):
        loop.train(run)


def test_weights_that_are_not_the_published_ones_are_told(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(VGG, perceptual_weights=(files["vgg"],))
    assert "vgg.safetensors has VGG16's shapes but not its published weights" in note_on(open_distance(run))
    trunk = SOURCES["vgg16"].trunk._replace(tensors_sha256=digest(trunk_of("vgg16")))
    monkeypatch.setitem(SOURCES, "vgg16", SOURCES["vgg16"]._replace(trunk=trunk))
    assert note_on(open_distance(run)) == ""
    assert note_on(None) == ""


def test_training_with_the_published_weights_lowers_the_distance(shared: Path) -> None:
    path = shared / "weights" / "vgg16_features.safetensors"
    if not path.is_file():
        pytest.skip("needs the weights of VGG16")
    run = with_overrides(
        dataclasses.replace(VGG, perceptual_weights=(str(path),)),
        {"model.warmup_steps": 0, "model.conv_init_std": 0.06, "model.initial_feature_log_var": -4.0},
    )
    distance = open_distance(run)
    assert distance is not None
    assert distance.record["published"] is True
    clip = next(iter_clips(open_source("sim:balls-interaction", "train"), limit=1, length=3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = families.build(run.model).train()
        families.set_perceptual(model, distance.distance)
        families.set_step(model, 1000)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        recon = []
        for _ in range(12):
            loss = model(to_model_input(collate([clip])))
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            recon.append(float(loss.terms["recon"]))
    assert sum(recon[-3:]) < 0.8 * sum(recon[:3])


def test_the_doctor_asks_for_the_weights_and_tries_a_step_without(files: dict[str, str]) -> None:
    def look(*paths: str, preset: str = "ddlp/debug-vgg") -> tuple[doctor.Case, list[doctor.Finding]]:
        case = doctor._case(DoctorRun(preset=preset, out="/tmp", perceptual_weights=paths))
        return case, list(doctor.check_weights(case))

    case, (finding,) = look()
    assert finding.level == "warn"
    assert "python jobs/fetch_weights.py --network vgg16" in finding.text
    assert vars(doctor._with_weights(case).model)["recon_loss"] == "mse"
    case, (finding,) = look(files["alex"])
    assert finding.level == "FAIL"
    case, (finding,) = look(files["vgg"])
    assert finding.level == "warn"
    assert "not its published weights" in finding.text
    assert doctor._with_weights(case).perceptual_weights == (files["vgg"],)
    assert look(preset="ddlp/debug")[1] == []


def test_a_checksum_is_told_in_full() -> None:
    names = [source for sources in SOURCES.values() for source in sources]
    assert all(len(value) == 64 for source in names for value in source[1:])
    for network, sources in SOURCES.items():
        stem = sources.trunk.url.rsplit("-", 1)[1].removesuffix(".pth")
        assert sources.trunk.file_sha256.startswith(stem), network  # torchvision's names carry the beginning
    assert perceptual.advice("alexnet").count("alexnet") == 3


# ---- fetching ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sources]:
    """Files as torchvision and LPIPS publish them, with random weights, and how they are known."""
    folder = tmp_path_factory.mktemp("official")
    trunk, heads = trunk_of("alexnet"), heads_of("alexnet")
    classifier = {"classifier.1.weight": torch.zeros(4, 4), "classifier.1.bias": torch.zeros(4)}
    torch.save(OrderedDict(trunk | classifier), folder / "alexnet-owt-00000000.pth")
    torch.save(
        OrderedDict({f"lin{i}.model.1.weight": heads[f"heads.{i}.weight"] for i in range(5)}), folder / "alex.pth"
    )

    def known(name: str, tensors: dict[str, Tensor]) -> Source:
        return Source((folder / name).as_uri(), store.sha256_file(str(folder / name)), digest(tensors))

    return folder, Sources(known("alexnet-owt-00000000.pth", trunk), known("alex.pth", heads))


def load(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def check_fetched(path: str, monkeypatch: pytest.MonkeyPatch, sources: Sources) -> None:
    monkeypatch.setitem(SOURCES, "alexnet", sources)
    found = read_weights([path])["alexnet"]
    assert found.record["published"] is True
    tensors = load_file(path)
    assert set(tensors) == {*trunk_of("alexnet"), *heads_of("alexnet")}  # no classifier
    assert all(torch.equal(tensors[name], value) for name, value in (trunk_of("alexnet") | heads_of("alexnet")).items())


def test_official_files_are_downloaded_and_converted(
    official: tuple[Path, Sources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sources = official
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        served = Sources(*(source._replace(url=address + source.url.rsplit("/", 1)[1]) for source in sources))
        monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        out = str(tmp_path / "new" / "alexnet.safetensors")
        assert fetch_weights(FetchWeightsRun("alexnet", out), load, {"alexnet": served}) == out
        missing = Sources(served.trunk._replace(url=address + "nothing.pth"), served.heads)
        with pytest.raises(ValueError, match=r"cannot download http.*nothing.pth .*[Nn]ot found.*give --trunk FILE"):
            fetch_weights(FetchWeightsRun("alexnet", str(tmp_path / "b")), load, {"alexnet": missing})
        server.shutdown()
    assert f"downloading {address}alexnet-owt-00000000.pth" in capsys.readouterr().err
    check_fetched(out, monkeypatch, sources)
    assert not (tmp_path / "b").exists()


def test_files_that_are_here_already_are_converted_to_the_same_bytes(
    official: tuple[Path, Sources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sources = official
    paths: dict[str, Any] = {"trunk": str(folder / "alexnet-owt-00000000.pth"), "heads": str(folder / "alex.pth")}
    for name in ("a", "b"):
        fetch_weights(FetchWeightsRun("alexnet", str(tmp_path / name), **paths), load, {"alexnet": sources})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    check_fetched(str(tmp_path / "a"), monkeypatch, sources)
    parts: dict[str, Any] = {
        "trunk": saved(tmp_path / "t.safetensors", trunk_of("alexnet")),
        "heads": saved(tmp_path / "h.safetensors", heads_of("alexnet")),
    }
    fetch_weights(FetchWeightsRun("alexnet", str(tmp_path / "c"), **parts), load, {"alexnet": sources})
    check_fetched(str(tmp_path / "c"), monkeypatch, sources)


def test_a_file_of_another_checksum_is_refused_before_it_is_loaded(
    official: tuple[Path, Sources], tmp_path: Path
) -> None:
    folder, sources = official
    loaded: list[BinaryIO] = []
    whole = (folder / "alexnet-owt-00000000.pth").read_bytes()
    (tmp_path / "alexnet-owt-00000000.pth").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run = FetchWeightsRun("alexnet", str(tmp_path / "out"), trunk=str(tmp_path / "alexnet-owt-00000000.pth"))
    with pytest.raises(ValueError, match=r"has SHA-256 .*, but the official alexnet-owt-00000000.pth has .*damaged"):
        fetch_weights(run, lambda file: loaded.append(file) or {}, {"alexnet": sources})
    changed = Sources(sources.trunk._replace(file_sha256="0" * 64), sources.heads)
    with pytest.raises(ValueError, match=r"file:///.*alexnet-owt-00000000.pth has SHA-256"):
        fetch_weights(FetchWeightsRun("alexnet", run.out), lambda file: loaded.append(file) or {}, {"alexnet": changed})
    assert loaded == []
    assert not (tmp_path / "out").exists()


def test_other_tensors_than_the_published_ones_are_refused(official: tuple[Path, Sources], tmp_path: Path) -> None:
    _, sources = official
    run = FetchWeightsRun("alexnet", str(tmp_path / "out"))
    other = saved(tmp_path / "other.safetensors", trunk_of("alexnet", seed=1))
    with pytest.raises(ValueError, match=r"other.safetensors does not hold the published trunk"):
        fetch_weights(dataclasses.replace(run, trunk=other), load, {"alexnet": sources})
    with pytest.raises(ValueError, match=r"other.safetensors does not hold the published heads"):
        fetch_weights(dataclasses.replace(run, heads=other), load, {"alexnet": sources})
    with pytest.raises(ValueError, match=r"--trunk .*nothing is not a file"):
        fetch_weights(dataclasses.replace(run, trunk=str(tmp_path / "nothing")), load, {"alexnet": sources})


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_the_job_joins_the_published_trunk_with_the_heads_that_torchmetrics_brings(
    network: Network, shared: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = shared / "weights" / f"{network}_features.safetensors"
    if not trunk.is_file():
        pytest.skip(f"needs the weights of {network}")
    out = tmp_path / "weights.safetensors"
    words = ["--network", network, "--trunk", str(trunk), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["jobs/fetch_weights.py", *words])
    runpy.run_path(str(repository / "jobs" / "fetch_weights.py"), run_name="__main__")
    found = read_weights([str(out)])[network]
    assert found.record["published"] is True
    assert (found.trunk is not None, len(found.heads)) == (True, 5)
