"""The video presets against a table typed from the paper's and the released code's settings."""

import pytest

from objdyn.models.ddlp import DDLPConfig
from pipeline.config import TrainRun
from pipeline.presets import ABOUT, PRESETS

# image, batch, KL weight, patch, L, K, features, glimpse's ratio and pixels, channels, T, PINT's width, warm-up epochs
PUBLISHED = {
    "balls": (64, 32, 0.1, 8, 12, 10, 3, 0.25, 16, (32, 64, 128), 20, 256, 1),
    "balls-released": (64, 32, 0.1, 8, 12, 6, 3, 0.25, 16, (32, 64, 128), 10, 256, 1),
    "obj3d": (64, 10, 30.0, 8, 16, 8, 10, 0.25, 16, (32, 64, 128), 10, 256, 1),
    "obj3d128": (128, 4, 100.0, 16, 16, 12, 8, 0.25, 32, (32, 64, 128, 256), 10, 256, 1),
    "clevrer": (128, 8, 100.0, 16, 16, 12, 8, 0.25, 32, (32, 64, 128, 256), 20, 256, 1),
    "phyre": (128, 3, 0.15, 16, 30, 25, 4, 0.125, 16, (32, 64, 128, 256), 20, 512, 1),
    "phyre-released": (128, 3, 0.15, 16, 30, 25, 4, 0.125, 16, (32, 64, 128, 256), 15, 512, 1),
    "traffic": (128, 8, 40.0, 16, 30, 25, 8, 0.25, 32, (32, 64, 128, 256), 10, 256, 3),
}


def model_of(run: TrainRun) -> DDLPConfig:
    assert isinstance(run.model, DDLPConfig)
    return run.model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_video_presets_have_the_published_numbers(name: str) -> None:
    run, model = PRESETS["ddlp"][name], model_of(PRESETS["ddlp"][name])
    epoch = model.noisy_steps  # one epoch of noise after the warm-up
    assert (
        model.image_size, run.optim.batch_size, model.kl_weight, model.patch_size, model.num_proposals,
        model.num_particles, model.feature_dim, model.glimpse_ratio, model.glimpse_size, model.encoder_channels,
        model.max_frames, model.pint_dim, model.warmup_steps // epoch,
    ) == PUBLISHED[name]  # fmt: skip
    assert model.num_patches == 64
    assert model.background_dim == model.feature_dim
    assert run.clip_frames == model.max_frames + 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_published_video_presets_share_is_as_published(name: str) -> None:
    run, model = PRESETS["ddlp"][name], model_of(PRESETS["ddlp"][name])
    epoch = model.noisy_steps
    optim = run.optim
    assert (optim.lr, optim.eps, optim.decay, optim.decay_steps) == (2e-4, 1e-4, 0.95, epoch)
    assert optim.betas == (0.9, 0.999)
    assert run.steps == 150 * epoch
    assert model.warmup_steps % epoch == 0
    assert model.ramp_steps == model.warmup_steps // epoch * max(10_000, epoch)
    assert (model.recon_weight, model.kl_balance, model.burn_in_frames) == (1.0, 0.001, 4)
    assert (model.prior_channels, model.scale_std, model.offset_std) == ((16, 32, 64), 0.3, 0.2)
    assert (model.transparency_prior, model.proposal_filter, model.use_score_map) == ((0.1, 0.1), "variance", True)
    assert (model.pint_layers, model.pint_heads) == (6, 8)


@pytest.mark.parametrize("family", PRESETS)
def test_every_preset_says_what_it_is(family: str) -> None:
    assert PRESETS[family].keys() == ABOUT[family].keys()


@pytest.mark.parametrize("name", ["road-small", "phyre-small"])
def test_presets_for_recordings_take_the_clips_that_their_data_sets_hold(name: str) -> None:
    run = PRESETS["ddlp"][name]
    assert (run.data, run.clip_frames, model_of(run).image_size) == ("", 11, 64)
    assert model_of(run).warmup_steps + model_of(run).noisy_steps < run.steps // 3
