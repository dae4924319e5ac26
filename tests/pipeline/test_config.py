"""What the runs' settings offer beside their fields."""

import pytest
import torch

from objdyn.models.iodine import IODINEConfig
from pipeline.config import TrainRun, flatten_settings, parse_settings, torch_device, with_overrides


def test_nested_settings_get_dotted_names() -> None:
    nested = {"steps": 3, "optim": {"lr": 0.1, "betas": [0.9, 0.99], "more": {"a": None}}, "empty": {}}
    assert flatten_settings(nested) == {"steps": 3, "optim.lr": 0.1, "optim.betas": [0.9, 0.99], "optim.more.a": None}


def test_settings_that_are_only_possible_together_are_set_together() -> None:
    run = with_overrides(TrainRun(), {"optim.micro_batch_size": 5, "optim.batch_size": 10})
    assert (run.optim.batch_size, run.micro_batch_size) == (10, 5)


def test_settings_have_the_types_of_their_fields() -> None:
    run = TrainRun(model=IODINEConfig())
    words = ['stages=["steps=2 data=\'a b\'", ""]', "optim.clip_norm=5", "optim.micro_batch_size=null", "resume=true"]
    words += ["model.decoder_channels=[8, 4]", "model.refine=strided", "optim.betas=0.5,0.9", "data=sim:a:b=1,c=d"]
    settings = parse_settings(words, run)
    assert settings == {
        "stages": ("steps=2 data='a b'", ""),
        "optim.clip_norm": 5.0,
        "optim.micro_batch_size": None,
        "resume": True,
        "model.decoder_channels": (8, 4),
        "model.refine": "strided",
        "optim.betas": (0.5, 0.9),
        "data": "sim:a:b=1,c=d",
    }
    assert isinstance(settings["optim.clip_norm"], float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.warmup_steps": -1}, "optim.warmup_steps must be 0"),
        ({"optim.anneal_steps": -1}, "optim.anneal_steps must be 0"),
        ({"optim.anneal_to": 1.5}, r"optim.anneal_to is a factor in \[0, 1\], got 1.5"),
    ],
)
def test_an_impossible_schedule_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_overrides(TrainRun(), changes)


@pytest.mark.parametrize(
    ("name", "workers", "gpu", "chosen"),
    [
        ("auto", 1, True, "cuda"),
        ("auto", 2, True, "cpu"),
        ("auto", 1, False, "cpu"),
        ("cpu", 1, True, "cpu"),
        ("cuda", 2, True, "cuda"),
    ],
)
def test_auto_takes_a_gpu_for_a_single_worker(
    monkeypatch: pytest.MonkeyPatch, name: str, workers: int, gpu: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert torch_device(name, workers) == torch.device(chosen)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU on this machine; use --device cpu"):
        torch_device("cuda")
