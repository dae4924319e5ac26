import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta, Normal, kl_divergence

from objdyn import families
from objdyn.layers import particles
from objdyn.layers.perceptual import Trunk, load_trunk
from objdyn.layers.spatial import cut_glimpses
from objdyn.losses import squared_error, vgg_distance
from objdyn.models import ddlp, dlp
from objdyn.models.ddlp import DDLP, DDLPConfig, match_template
from objdyn.models.dlp import Particles, Stage
from objdyn.models.pint import PINT
from pipeline import textbook_pint
from pipeline.presets import PRESETS


def config(preset: str) -> DDLPConfig:
    found = PRESETS["ddlp"][preset].model
    assert isinstance(found, DDLPConfig)
    return found


DEBUG = config("debug")


def build(seed: int = 0, **changes: Any) -> DDLP:
    torch.manual_seed(seed)
    return DDLP(dataclasses.replace(DEBUG, **changes))


def clip(t: int = 6, b: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(b, t, 3, size, size, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# total, prior, attribute encoder, appearance encoder, glimpse decoder, background, PINT
PUBLISHED = {
    "balls-released": (9_652_801, 72_369, 340_524, 338_838, 630_340, 3_191_913, 5_078_817),
    "obj3d": (9_678_144, 72_369, 340_524, 342_436, 632_132, 3_197_303, 5_093_380),
    "obj3d128": (11_716_654, 72_369, 733_740, 734_624, 668_612, 4_417_651, 5_089_658),
    "clevrer": (11_717_614, 72_369, 733_740, 734_624, 668_612, 4_417_651, 5_090_618),
    "phyre-released": (26_052_426, 72_369, 340_524, 339_352, 630_596, 4_414_571, 20_255_014),
    "traffic": (11_717_902, 72_369, 733_740, 734_624, 668_612, 4_417_651, 5_090_906),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_module_sizes_equal_the_published_ones(preset: str) -> None:
    with torch.device("meta"):
        model = DDLP(config(preset))
    parts = (
        count(model),
        count(model.prior),
        count(model.attribute_encoder),
        count(model.appearance_encoder),
        count(model.glimpse_decoder),
        count(model.background_encoder) + count(model.background_decoder),
        count(model.pint),
    )
    assert parts == PUBLISHED[preset]


def test_weights_start_as_released_unless_asked_otherwise() -> None:
    released, short = build(), build(conv_init_std=0.06, initial_feature_log_var=-4.0)
    for model, std in ((released, 0.01), (short, 0.06)):
        weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d)])
        assert weights.std().item() == pytest.approx(std, rel=0.03)
    heads = (released.appearance_encoder.head.bias, short.appearance_encoder.head.bias)
    # torch's default for a linear layer of 256 inputs is uniform within 1/16
    assert heads[0].abs().max() <= 1 / 16
    assert (heads[1][3:] + 4).abs().max() <= 1 / 16
    assert next(released.pint.mix.parameters()).std().item() == pytest.approx(0.02, rel=0.1)


def test_the_paper_and_the_released_balls_differ_where_stated() -> None:
    paper, released = config("balls"), config("balls-released")
    assert (paper.num_particles, paper.max_frames) == (10, 20)
    assert (released.num_particles, released.max_frames) == (6, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_particles": 9}, "num_particles=9, num_proposals=8"),
        ({"num_proposals": 65}, "number of patches"),
        ({"image_size": 60}, "powers of two"),
        ({"glimpse_ratio": 0.3}, "powers of two"),
        ({"patch_size": 4}, "patch_size"),
        ({"burn_in_frames": 6}, "burn_in_frames <= max_frames"),
        ({"pint_heads": 3}, "divisible"),
        ({"kl_weight": -0.1}, "kl_weight must not be negative"),
        ({"transparency_prior": (0.1, 0.0)}, "transparency_prior"),
        ({"frozen_inference": True, "kl_weight": 0.0}, "frozen_inference trains with the dynamic KL alone"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DEBUG, **changes)


@pytest.mark.parametrize("shape", [(2, 6, 3, 32, 32), (2, 6, 1, 64, 64), (6, 3, 64, 64)])
def test_frames_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected video of shape"):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize("frames", [2, 7])
def test_training_clips_of_unfit_length_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="must have 3 to 6 frames"):
        build()(clip(frames))


# ---- tracking ----------------------------------------------------------------------------------------------------


def naive_score_map(window: Tensor, template: Tensor) -> Tensor:
    """The definition, displacement by displacement."""
    s = window.shape[-1]
    padded = F.pad(window[None], (s, s, s, s), mode="replicate")[0]
    full = torch.zeros(2 * s + 1, 2 * s + 1)
    for i in range(2 * s + 1):
        for j in range(2 * s + 1):
            patch = padded[:, i : i + s, j : j + s]
            energy = patch.square().sum() * template.square().sum()
            full[i, j] = (patch * template).sum() / ((energy + 1e-10).sqrt() + 1e-5)
    score = full[s // 2 + 1 : 2 * s + 1 - s // 2, s // 2 + 1 : 2 * s + 1 - s // 2]
    return (score - score.min()) / (score.max() - score.min() + 1e-5)


def test_score_map_equals_its_definition() -> None:
    window, template = torch.rand(2, 1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    score = match_template(window, template)
    assert score.shape == (1, 3, 1, 8, 8)
    for k in range(3):
        torch.testing.assert_close(score[0, k, 0], naive_score_map(window[0, k], template[0, k]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [1, 1 << 30], ids=["one by one", "all at once"])
@pytest.mark.parametrize("side", [8, 16, 32])
def test_score_maps_equal_the_grouped_convolutions(side: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddlp, "SCORED_AT_ONCE", pieces)
    generator = torch.Generator().manual_seed(0)
    window, template = torch.rand(2, 2, 3, 3, side, side, generator=generator, dtype=torch.float64)
    expected = textbook_pint.score_maps(window, template)
    torch.testing.assert_close(match_template(window, template), expected, atol=1e-9, rtol=0)
    coarse = match_template(window.float(), template.float())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.double(), expected, atol=1e-3, rtol=0)


def test_a_ball_before_black_scores_nothing_where_there_is_only_black() -> None:
    window = torch.zeros(1, 1, 3, 16, 16)
    window[..., 10:, 10:] = 0.9
    template = torch.zeros(1, 1, 3, 16, 16)
    template[..., 4:12, 4:12] = 1.0
    score = match_template(window, template)
    torch.testing.assert_close(score, textbook_pint.score_maps(window, template), atol=1e-5, rtol=0)
    assert score[..., 0, 0].max() < 1e-6  # a window in which nothing is


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (2, -3), (-3, 4)])
def test_score_map_peaks_at_the_displacement(dy: int, dx: int) -> None:
    scene = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    centre, scale = torch.zeros(1, 1, 2), torch.full((1, 1, 2), 15 / 39)
    template = cut_glimpses(scene, centre, scale, 16)
    window = cut_glimpses(torch.roll(scene, (dy, dx), (2, 3)), centre, scale, 16)
    peak = match_template(window, template)[0, 0, 0].flatten().argmax().item()
    assert divmod(peak, 16) == (16 // 2 - 1 + dy, 16 // 2 - 1 + dx)


def test_encoding_follows_no_gradient_through_time() -> None:
    model = build().train()
    video = clip().requires_grad_()
    posterior = model._track(video, sample=False, stage=Stage(False, False))
    posterior.distribution.attributes.position[:, 3].sum().backward()
    assert video.grad is not None
    assert not video.grad[:, :3].any()
    assert video.grad[:, 3].any()


def test_a_particle_that_is_tracked_keeps_its_anchor_at_its_last_position() -> None:
    posterior = build()._track(clip(), sample=False, stage=Stage(False, False))
    torch.testing.assert_close(posterior.anchor[:, 1:], posterior.latents.position[:, :-1])
    moved = posterior.anchor + posterior.distribution.attributes.position
    torch.testing.assert_close(posterior.latents.position, moved)


def test_without_tracking_every_frame_is_encoded_as_by_the_image_model() -> None:
    model, video = build(tracking=False).eval(), clip()
    with torch.no_grad():
        whole, last = model.encode(video), model.encode(video[:, -1:])
        posterior = model._track(video, sample=False, stage=Stage(False, False))
    assert not families.describe(model.config).tracked
    assert families.describe(DEBUG).tracked
    for a, b in zip(whole, last, strict=True):
        torch.testing.assert_close(a[:, -1:], b, atol=1e-5, rtol=1e-4)
    assert posterior.proposals.shape[1] == DEBUG.burn_in_frames
    moved = posterior.anchor + posterior.distribution.attributes.position
    torch.testing.assert_close(posterior.latents.position, moved)
    assert not torch.allclose(posterior.anchor[:, 1:], posterior.latents.position[:, :-1])


def test_the_ablations_differ_from_balls_in_one_setting_each() -> None:
    balls = config("balls")
    assert config("balls-no-tracking") == dataclasses.replace(balls, tracking=False)
    assert config("balls-no-relative-bias") == dataclasses.replace(balls, pint_position="learned")


# ---- PINT --------------------------------------------------------------------------------------------------------


def test_relative_bias_depends_on_differences_only_and_is_causal() -> None:
    torch.manual_seed(0)
    pint = PINT(2, 4, 3, 3, dim=8, layers=2, heads=2, dropout=0.0)
    biases = pint.biases(4)
    for layer, block in enumerate(pint.layers):
        bias = biases[layer, 0]
        for t in range(4):
            for u in range(4):
                for i in range(3):
                    for j in range(3):
                        value = bias[:, t * 3 + i, u * 3 + j]
                        if u > t:
                            assert torch.isinf(value).all()
                        else:
                            expected = block.time_bias[:, 3 + u - t] + block.entity_bias[:, 2 + j - i]
                            torch.testing.assert_close(value, expected)
    torch.testing.assert_close(pint.biases(2), biases[:, :, :, :6, :6])


def test_biases_start_as_released_unless_asked_otherwise() -> None:
    released, short = build(), build(pint_bias_init_std=1.0, pint_own_bias=4.0)
    for model, std, own in ((released, 0.02, 0.0), (short, 1.0, 4.0)):
        block = model.pint.layers[0]
        assert block.time_bias.std().item() == pytest.approx(std, rel=0.5)
        assert block.entity_bias[:, block.entities - 1].mean().item() == pytest.approx(own, abs=2 * std)


def latents_of(model: DDLP, t: int = 5) -> Particles:
    with torch.no_grad():
        return model.encode(clip(t))


def test_pint_predicts_from_the_past_alone() -> None:
    model = build().eval()
    latents = latents_of(model)
    changed = Particles(*(torch.cat([field[:, :3], field[:, 3:] + 1], dim=1) for field in latents))
    before, after = model.pint(latents), model.pint(changed)
    torch.testing.assert_close(before.attributes.position[:, :3], after.attributes.position[:, :3])
    torch.testing.assert_close(before.background.mean[:, :3], after.background.mean[:, :3])
    assert not torch.allclose(before.attributes.depth_log_var[:, 3:], after.attributes.depth_log_var[:, 3:])


def test_pint_predicts_changes_but_absolute_transparency() -> None:
    pint = PINT(2, 4, 3, 3, dim=16, layers=1, heads=2, dropout=0.0).eval()
    for head in (pint.attributes.y, pint.attributes.scale, pint.attributes.depth, pint.features, pint.background):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    for head in (pint.attributes.x, pint.attributes.transparency):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 0.5)
    torch.manual_seed(0)
    latents = Particles(
        torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2), torch.rand(1, 3, 2),
        torch.randn(1, 3, 2, 3), torch.randn(1, 3, 3),
    )  # fmt: skip
    prediction = pint(latents)
    torch.testing.assert_close(prediction.attributes.position[..., 0], latents.position[..., 0])
    torch.testing.assert_close(
        prediction.attributes.position[..., 1], latents.position[..., 1] + torch.tensor(0.5).tanh()
    )
    torch.testing.assert_close(prediction.attributes.scale, latents.scale)
    torch.testing.assert_close(prediction.attributes.depth, latents.depth)
    torch.testing.assert_close(prediction.features.mean, latents.features)
    torch.testing.assert_close(prediction.background.mean, latents.background)
    torch.testing.assert_close(prediction.attributes.transparency, torch.full((1, 3, 2), 0.5))


def test_depth_log_variance_has_its_own_head() -> None:
    model = build().eval()
    latents = latents_of(model)
    before = model.pint(latents).attributes
    with torch.no_grad():
        model.pint.attributes.depth.bias[1] += 1.0
    after = model.pint(latents).attributes
    torch.testing.assert_close(after.depth, before.depth)
    torch.testing.assert_close(after.depth_log_var, before.depth_log_var + 1.0)


def test_rollout_uses_at_most_the_last_frames_that_pint_covers() -> None:
    model = build().eval()
    latents = latents_of(model, 9)
    short = latents.frames(-5, None)
    for a, b in zip(model.rollout(latents, 7), model.rollout(short, 7), strict=True):
        torch.testing.assert_close(a, b)


# ---- loss --------------------------------------------------------------------------------------------------------


def gaussian(mean: Tensor, log_var: Tensor) -> Normal:
    return Normal(mean, (0.5 * log_var).exp())


def test_evaluation_loss_equals_its_definition() -> None:
    model = build().eval()
    video = clip()
    loss = model(video)
    posterior = model._track(video, sample=False, stage=Stage(False, False))
    q, z = posterior.distribution, posterior.latents
    recon = (model.decode(z).video - video).square().sum((1, 2, 3, 4)).mean()

    a, tau, balance = q.attributes, DEBUG.burn_in_frames, DEBUG.kl_balance
    logit = float(torch.logit(torch.tensor(0.75 * 0.25)))
    static = kl_divergence(gaussian(a.position, a.position_log_var), Normal(0.0, 0.2)).sum((2, 3))
    static = static + kl_divergence(gaussian(a.scale, a.scale_log_var), Normal(logit, 0.3)).sum((2, 3))
    static = static + kl_divergence(Beta(a.transparency_a, a.transparency_b), Beta(0.1, 0.1)).sum(2)
    static = static + balance * kl_divergence(gaussian(a.depth, a.depth_log_var), Normal(0.0, 1.0)).sum(2)
    static = static + balance * kl_divergence(gaussian(*q.features), Normal(0.0, 1.0)).sum((2, 3))
    static = static + balance * kl_divergence(gaussian(*q.background), Normal(0.0, 1.0)).sum(2)
    distance = torch.cdist(posterior.anchor[:, :tau], posterior.proposals).square() / 2
    chamfer = distance.amin(-1).sum(-1) + distance.amin(-2).sum(-1)
    static = (static[:, :tau] + 0.5 * balance * chamfer).sum(1).mean()

    p = model.pint(z.frames(None, -1))
    pa = p.attributes
    dynamic = kl_divergence(
        gaussian((posterior.anchor + a.position)[:, 1:], a.position_log_var[:, 1:]),
        gaussian(pa.position, pa.position_log_var),
    ).sum((2, 3))
    dynamic = dynamic + kl_divergence(
        gaussian(a.scale[:, 1:], a.scale_log_var[:, 1:]), gaussian(pa.scale, pa.scale_log_var)
    ).sum((2, 3))
    dynamic = dynamic + kl_divergence(
        gaussian(a.depth[:, 1:], a.depth_log_var[:, 1:]), gaussian(pa.depth, pa.depth_log_var)
    ).sum(2)
    dynamic = dynamic + kl_divergence(
        Beta(a.transparency_a[:, 1:], a.transparency_b[:, 1:]), Beta(pa.transparency_a, pa.transparency_b)
    ).sum(2)
    dynamic = dynamic + kl_divergence(
        gaussian(q.features.mean[:, 1:], q.features.log_var[:, 1:]), gaussian(*p.features)
    ).sum((2, 3))
    dynamic = dynamic + kl_divergence(
        gaussian(q.background.mean[:, 1:], q.background.log_var[:, 1:]), gaussian(*p.background)
    ).sum(2)
    dynamic = dynamic[:, tau - 1 :].sum(1).mean()

    expected = (recon + DEBUG.kl_weight * (static + dynamic)) / 6
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(loss.terms["kl_static"], (static / 6).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.terms["kl_dynamic"], (dynamic / 6).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "weights"),
    # ramp of 10 steps over T = 5 frames: the k-th frame after 2 burn-in frames is full after 2 (k + 1) steps
    [(0, [1, 1, 0, 0, 0, 0]), (2, [1, 1, 1, 0.5, 1 / 3, 0.25]), (8, [1, 1, 1, 1, 1, 1])],
)
def test_later_frames_gain_weight_one_after_the_other(step: int, weights: list[float]) -> None:
    model = build().train()
    model.step.fill_(step)
    torch.testing.assert_close(model._frame_weights(6, clip()), torch.tensor(weights, dtype=torch.float32))
    assert (model.eval()._frame_weights(6, clip()) == 1).all()


@pytest.mark.parametrize(("step", "stage"), [(0, (True, True)), (3, (False, True)), (5, (False, False))])
def test_stages_follow_the_step(step: int, stage: tuple[bool, bool]) -> None:
    model = build(warmup_steps=3, noisy_steps=2).train()
    model.step.fill_(step)
    assert tuple(model._stage()) == stage
    assert tuple(model.eval()._stage()) == (False, False)


@pytest.mark.parametrize("step", [0, 3, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"tracking": False}, {"pint_position": "learned"}, {"frozen_inference": True}], ids=str
)
def test_every_parameter_gets_a_gradient_in_every_stage(step: int, changes: dict[str, Any]) -> None:
    model = build(warmup_steps=3, noisy_steps=2, **changes).train()
    model.step.fill_(step)
    model(clip()).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


FROZEN = [{}, {"tracking": False}, {"proposal_filter": "none", "num_proposals": 64}]


def dynamic_kl(model: DDLP, video: Tensor) -> Tensor:
    """Of all frames after the burn-in, per frame, with gradients to everything; seeded as the loss it is held to."""
    torch.manual_seed(1)
    posterior = model._track(video, sample=True, stage=Stage(False, False))
    prior = model.pint(posterior.latents.frames(None, -1))
    return model._dynamic_kl(posterior, prior).sum(1).mean() / video.shape[1]


@pytest.mark.parametrize("changes", FROZEN, ids=str)
def test_frozen_inference_trains_pint_alone_by_the_whole_dynamic_kl(changes: dict[str, Any]) -> None:
    frozen = build(frozen_inference=True, warmup_steps=3, **changes).train()  # neither warm-up nor ramp at step 0
    model = build(**changes).train()
    torch.manual_seed(1)
    loss = frozen(clip())
    loss.total.backward()
    expected = dynamic_kl(model, clip())
    (model.config.kl_weight * expected).backward()

    torch.testing.assert_close(loss.total, model.config.kl_weight * expected)
    torch.testing.assert_close(loss.terms["kl_dynamic"], expected.detach())
    assert set(loss.terms) == {"kl_dynamic", "visible_particles", "glimpse_side"}
    whole = dict(model.named_parameters())
    for name, parameter in frozen.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("pint."):
            torch.testing.assert_close(parameter.grad, whole[name].grad, msg=name)
        else:
            assert not parameter.grad.any(), name
    assert any(p.grad is not None and p.grad.any() for p in model.appearance_encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in frozen.pint.parameters())


def test_frozen_inference_scales_its_loss_as_the_perceptual_distance_does_and_needs_none() -> None:
    plain, scaled = build(frozen_inference=True).train(), build(frozen_inference=True, recon_loss="vgg").train()
    found = []
    for model in (plain, scaled):
        torch.manual_seed(1)
        found.append(model(clip()))
    torch.testing.assert_close(found[1].total, 1e-3 * found[0].total)


def test_frozen_inference_leaves_all_but_pint_bit_for_bit_as_it_was() -> None:
    model = build(frozen_inference=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(clip()).total.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.partition(".")[0] for name in changed} == {"pint"}


def test_frozen_inference_changes_nothing_in_evaluation() -> None:
    with torch.no_grad():
        a, b = build().eval()(clip()), build(frozen_inference=True).eval()(clip())
    assert torch.equal(a.total, b.total)
    assert set(a.terms) == set(b.terms)


def test_one_particle_works() -> None:
    model = build(num_particles=1, num_proposals=1).train()
    loss = model(clip())
    loss.total.backward()
    assert torch.isfinite(loss.total)


def test_without_score_maps_the_encoder_has_three_channels() -> None:
    model = build(use_score_map=False)
    assert torch.isfinite(model(clip()).total)
    assert count(build()) - count(model) == 8 * 3 * 3


def test_bf16_autocast_gives_nearly_the_same_loss() -> None:
    model = build().eval()
    exact = model(clip()).total
    with torch.autocast("cpu", torch.bfloat16):
        coarse = model(clip()).total
    assert coarse.dtype == torch.float32
    # the reconstruction dominates; bf16 has 8 bits
    torch.testing.assert_close(coarse, exact, rtol=0.01, atol=0)


def test_distributions_stay_in_fp32_under_bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[torch.dtype]] = {}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            found = original(*arguments, **named)
            tensors = [x for x in (*arguments, found) if isinstance(x, Tensor)]
            seen.setdefault(name, set()).update(x.dtype for x in tensors if x.is_floating_point())
            return found

        monkeypatch.setattr(owner, name, watched)

    for owner in (ddlp, dlp):
        watch(owner, "beta_kl")
        watch(owner, "gaussian_kl")
    for name in ("gaussian_sample", "beta_sample", "chamfer_kl"):
        watch(dlp, name)
    for name in ("digamma", "lgamma"):
        watch(torch, name)
    watch(particles, "spatial_softmax")
    model = build().train()
    model.step.fill_(100)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clip())
    assert set(seen) == {"beta_kl", "gaussian_kl", "gaussian_sample", "beta_sample", "chamfer_kl", "digamma", "lgamma",
                         "spatial_softmax"}  # fmt: skip
    assert {name for name, dtypes in seen.items() if dtypes != {torch.float32}} == set()
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("components", [False, True])
def test_long_futures_are_decoded_a_few_frames_at_a_time(components: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().eval()
    with torch.no_grad():
        latents = latents_of(model, 5)
        whole = model.decode(latents, components=components)
        monkeypatch.setattr(dlp, "FRAMES_AT_ONCE", 3)
        at_once: list[int] = []
        name = "stitch" if components else "compose"
        original = getattr(dlp, name)
        monkeypatch.setattr(dlp, name, lambda *a, **k: at_once.append(len(a[0])) or original(*a, **k))
        pieces = model.decode(latents, components=components)
    assert at_once == [3, 3, 3, 1]  # 2 clips of 5 frames
    for a, b in zip(whole, pieces, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ---- perceptual loss ---------------------------------------------------------------------------------------------


def doubled(images: Tensor, recon: Tensor) -> Tensor:
    """A distance of known value: twice the squared error."""
    return 2 * squared_error(images, recon)


def test_the_perceptual_distance_takes_the_place_of_the_squared_error_and_scales_the_whole_loss() -> None:
    squared, perceptual = build().eval(), build(recon_loss="vgg").eval()
    families.set_perceptual(perceptual, doubled)
    with torch.no_grad():
        a, b = squared(clip()), perceptual(clip())
    torch.testing.assert_close(b.terms["recon"], 2 * a.terms["recon"])
    torch.testing.assert_close(b.terms["kl_static"], a.terms["kl_static"])
    torch.testing.assert_close(b.total, 1e-3 * (a.total + a.terms["recon"]))


def test_in_the_warm_up_the_distance_is_that_of_glimpses() -> None:
    seen = []

    def watched(images: Tensor, recon: Tensor) -> Tensor:
        seen.append((tuple(images.shape), tuple(recon.shape), images.requires_grad))
        return doubled(images, recon)

    models = [build(warmup_steps=5).train(), build(warmup_steps=5, recon_loss="vgg").train()]
    families.set_perceptual(models[1], watched)
    found = []
    for model in models:
        torch.manual_seed(1)
        found.append(model(clip()))
    assert seen == [((2, 6, 4, 3, 16, 16), (2, 6, 4, 3, 16, 16), False)]
    torch.testing.assert_close(found[1].terms["recon"], 2 * found[0].terms["recon"])


def test_the_distance_is_no_part_of_the_model() -> None:
    model = build(recon_loss="vgg")
    names = (list(model.state_dict()), count(model), len(list(model.modules())))
    with torch.device("meta"):
        trunk = Trunk("vgg16")
    families.set_perceptual(model, functools.partial(vgg_distance, trunk=trunk))
    assert (list(model.state_dict()), count(model), len(list(model.modules()))) == names
    with pytest.raises(ValueError, match="must be a function, not a module, got Trunk"):
        families.set_perceptual(model, trunk)


@pytest.mark.parametrize("step", [0, 1_000], ids=["warm-up", "later"])
def test_with_the_distance_of_vgg_every_parameter_gets_a_gradient(step: int) -> None:
    model = build(recon_loss="vgg", warmup_steps=5).train()
    with torch.random.fork_rng():
        trunk = load_trunk(Trunk("vgg16").state_dict())
    families.set_perceptual(model, functools.partial(vgg_distance, trunk=trunk))
    families.set_step(model, step)
    model(clip(t=3, b=1)).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    decoder = torch.cat([p.grad.flatten() for p in model.glimpse_decoder.parameters() if p.grad is not None])
    assert torch.isfinite(decoder).all()
    assert decoder.any()


def test_without_a_distance_training_says_what_to_do_and_the_other_verbs_work() -> None:
    model = build(recon_loss="vgg")
    with pytest.raises(ValueError, match=r"--perceptual-weights FILE.*set_perceptual.*model.recon_loss=mse"):
        model(clip())
    with torch.no_grad():
        model.decode(model.rollout(model.encode(clip()), 1))
