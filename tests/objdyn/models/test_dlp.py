import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Beta, Normal, kl_divergence

from objdyn.layers.particles import PatchPrior, ProposalMixer, spread_points
from objdyn.models.ddlp import DDLP, DDLPConfig
from objdyn.models.dlp import DLP, DLPConfig, Stage, supported_sizes
from pipeline.presets import PRESETS


def config(preset: str) -> DLPConfig:
    found = PRESETS["dlp"][preset].model
    assert isinstance(found, DLPConfig)
    return found


DEBUG = config("debug")
MEANS = Stage(warmup=False, noisy=False)
FILTERED: dict[str, Any] = {"proposal_filter": "variance", "num_proposals": 8}


def build(seed: int = 0, **changes: Any) -> DLP:
    torch.manual_seed(seed)
    return DLP(dataclasses.replace(DEBUG, conv_init_std=0.06, **changes))


def clip(t: int = 3, b: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(b, t, 3, size, size, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def gaussian(mean: Tensor, log_var: Tensor) -> Normal:
    return Normal(mean, (0.5 * log_var).exp())


# ---- settings ----------------------------------------------------------------------------------------------------


def test_the_published_image_settings_are_those_of_the_table() -> None:
    keys = (
        *("image_size", "kl_weight", "patch_size", "num_proposals", "num_particles", "feature_dim", "glimpse_size"),
        *("scale_std", "offset_std", "proposal_filter", "use_score_map", "encoder_channels", "prior_channels"),
    )
    table = {
        "shapes": (64, 0.05, 8, 64, 10, 6, 16, 0.3, 0.2, "none", False, (32, 32, 64, 64), (32, 32, 64)),
        "obj3d": (64, 40, 8, 16, 12, 8, 16, 0.3, 0.2, "variance", True, (32, 64, 128), (16, 32, 64)),
        "obj3d128": (128, 40, 16, 64, 12, 8, 32, 1, 1, "variance", False, (16, 32, 64, 64, 128), (16, 32, 64)),
        "traffic": (128, 40, 16, 64, 25, 8, 32, 1, 1, "variance", True, (32, 64, 64, 128, 128), (32, 32, 64)),
    }
    for preset, values in table.items():
        found = config(preset)
        assert tuple(getattr(found, key) for key in keys) == values, preset
        assert found.background_dim == found.feature_dim
        run = PRESETS["dlp"][preset]
        assert (run.optim.batch_size, run.optim.lr, run.optim.eps, run.clip_frames) == (32, 2e-4, 1e-4, 1)


def test_parts_have_the_published_sizes() -> None:
    with torch.device("meta"):
        small, large = DLP(config("obj3d")), DLP(config("obj3d128"))
    # the modules that the image and the video settings share, counted in the authors' code
    assert count(small.prior) == count(large.prior) == 72_369
    assert count(small.attribute_encoder) == 340_524
    assert count(large.attribute_encoder) == 733_740 - 16 * 9  # without the first convolution's score channel
    assert count(large.appearance_encoder) == 734_624
    assert count(large.glimpse_decoder) == 668_612
    assert small.mixer is None


def test_an_image_model_is_a_video_model_without_pint() -> None:
    fields = {field.name for field in dataclasses.fields(DLPConfig)}
    video = PRESETS["ddlp"]["balls-released"].model
    image = DLPConfig(**{name: value for name, value in dataclasses.asdict(video).items() if name in fields})
    with torch.device("meta"):
        assert count(DLP(image)) == 9_652_801 - 5_078_817


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**FILTERED, "num_particles": 9}, "num_particles <= num_proposals.*num_particles=9, num_proposals=8"),
        ({**FILTERED, "num_proposals": 17}, r"number of patches \(16 of 8 pixels\), got .*num_proposals=17"),
        ({"num_proposals": 8}, "'none' keeps the proposals of all patches, so num_proposals must be 16, got 8"),
        (
            {"image_size": 48},
            "got 48 and 12; supported are image_size 32 with glimpse_ratio 0.5 or 0.25, image_size 64",
        ),
        ({"glimpse_ratio": 0.3}, "must be powers of two, got 32 and 9; supported are image_size 32"),
        ({"glimpse_ratio": 0.125}, "8 pixels or more.* got 4 of 32; supported are image_size 32"),
        ({"proposal_filter": "mixer"}, "proposal_filter must be 'variance' or 'distance' or 'random' or 'none'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DEBUG, **changes)


def test_the_sizes_that_messages_name_are_supported() -> None:
    named = [pair.split(" with glimpse_ratio ") for pair in supported_sizes().split(", ")]
    sizes = [(int(size.split()[1]), float(ratio)) for size, ratios in named for ratio in ratios.split(" or ")]
    assert (256, 0.25) in sizes
    for size, ratio in sizes:
        settings = dataclasses.replace(DEBUG, image_size=size, glimpse_ratio=ratio, patch_size=size // 4)
        assert settings.glimpse_size == ratio * size
        with torch.device("meta"):
            DLP(settings)


def test_frames_of_256_pixels_with_glimpses_of_64_work() -> None:
    model = build(image_size=256, patch_size=64, encoder_channels=(4, 4, 4, 4, 4, 4), prior_channels=(4, 4)).train()
    video = clip(t=1, b=1, size=256)
    model(video).total.backward()
    with torch.no_grad():
        assert model.eval().decode(model.encode(video)).video.shape == video.shape


def test_an_image_model_does_not_predict() -> None:
    model = build()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="single images and predicts nothing; train ddlp"):
        model.rollout(model.encode(clip()), 1)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(batch, time, 3, 32, 32\), got \(2, 3, 3, 64, 64\)"):
        build().encode(clip(size=64))


# ---- inference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, FILTERED], ids=["mixer", "filter"])
def test_frames_are_independent(changes: dict[str, Any]) -> None:
    model, video = build(**changes).eval(), clip(t=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        latents, permuted = model.encode(video), model.encode(video[:, order])
        single = model.encode(video.flatten(0, 1).unsqueeze(1))
        loss = model(video)
        losses = [model(video[:, t : t + 1]).total for t in range(4)]
    for whole, other, alone in zip(latents, permuted, single, strict=True):
        torch.testing.assert_close(whole[:, order], other, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.flatten(0, 1), alone[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss.total, torch.stack(losses).mean())


@pytest.mark.parametrize("changes", [{}, FILTERED], ids=["mixer", "filter"])
def test_a_video_model_finds_in_its_first_frame_what_the_image_model_finds(changes: dict[str, Any]) -> None:
    image = build(**changes).eval()
    settings = dataclasses.asdict(image.config)
    pint: dict[str, Any] = {"max_frames": 4, "burn_in_frames": 2, "pint_dim": 16, "pint_layers": 1, "pint_heads": 2}
    video = DDLP(DDLPConfig(**settings, **pint)).eval()
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("pint.") for name in missing)
    frames = clip(t=4)
    with torch.no_grad():
        alone, tracked = image.encode(frames), video.encode(frames)
        assert torch.isfinite(video(frames).total)
    for one, other in zip(alone, tracked, strict=True):
        torch.testing.assert_close(one[:, 0], other[:, 0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone.position[:, 1:], tracked.position[:, 1:])


def test_anchors_are_the_best_proposals_where_they_are_filtered() -> None:
    model, frames = build(**FILTERED), clip(t=1)[:, 0]
    with torch.no_grad():
        proposals = model.prior(frames)
        assert torch.equal(model._anchors(frames, proposals), proposals[:, :3])


def test_a_random_choice_of_proposals_repeats_outside_of_training() -> None:
    model, video = build(**{**FILTERED, "proposal_filter": "random"}).eval(), clip()
    with torch.no_grad():
        first, second = model.encode(video), model.encode(video)
        alone = model.encode(video[1:, 1:2])
        chosen = model.train().prior(video[:, 0])
        assert not torch.equal(chosen, model.prior(video[:, 0]))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.testing.assert_close(first.position[1:, 1:2], alone.position, atol=1e-5, rtol=1e-4)


# ---- loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, FILTERED, {"num_particles": 1}], ids=["mixer", "filter", "one particle"])
def test_evaluation_loss_equals_its_definition(changes: dict[str, Any]) -> None:
    model, video = build(**changes).eval(), clip()
    with torch.no_grad():
        loss = model(video)
        posterior = model._find(video, sample=False, stage=MEANS)
        q, z = posterior.distribution, posterior.latents
        recon = (model.decode(z).video - video).square().sum((2, 3, 4)).mean()
    a, balance = q.attributes, DEBUG.kl_balance
    logit = float(torch.logit(torch.tensor(0.75 * 0.25)))
    kl = kl_divergence(gaussian(a.position, a.position_log_var), Normal(0.0, 0.2)).sum((2, 3))
    kl = kl + kl_divergence(gaussian(a.scale, a.scale_log_var), Normal(logit, 0.3)).sum((2, 3))
    kl = kl + kl_divergence(Beta(a.transparency_a, a.transparency_b), Beta(0.1, 0.1)).sum(2)
    kl = kl + balance * kl_divergence(gaussian(a.depth, a.depth_log_var), Normal(0.0, 1.0)).sum(2)
    kl = kl + balance * kl_divergence(gaussian(*q.features), Normal(0.0, 1.0)).sum((2, 3))
    kl = kl + balance * kl_divergence(gaussian(*q.background), Normal(0.0, 1.0)).sum(2)
    half = torch.zeros(2, 3)
    for b in range(2):
        for t in range(3):
            proposals, anchors = posterior.proposals[b, t], posterior.anchor[b, t]
            pairs = [[float((y - x).square().sum()) / 2 for x in proposals] for y in anchors]
            half[b, t] = sum(map(min, pairs)) + sum(map(min, zip(*pairs, strict=True)))
    kl = (kl + 0.5 * balance * half).mean()
    torch.testing.assert_close(loss.terms["recon"], recon, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(loss.terms["kl"], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.total, recon + DEBUG.kl_weight * kl, rtol=1e-4, atol=1e-3)


def test_the_warm_up_reconstructs_glimpses() -> None:
    model, video = build(warmup_steps=5, noisy_steps=5), clip()
    stage = Stage(warmup=True, noisy=True)
    with torch.no_grad():
        posterior = model._find(video, sample=False, stage=stage)
        drawn = model.glimpse_decoder(posterior.latents.features.flatten(0, 2))[:, 1:]
        error = (posterior.glimpses.flatten(0, 2) - drawn).square().sum((1, 2, 3)).view(2, 3, 3).sum(2)
        torch.testing.assert_close(model._recon_error(video, posterior, stage), error)
    for step, expected in ((0, (True, True)), (5, (False, True)), (10, (False, False))):
        model.step.fill_(step)
        assert model.train()._stage() == expected
    assert model.eval()._stage() == MEANS


@pytest.mark.parametrize("step", [0, 5, 10])
def test_every_parameter_gets_a_gradient_in_every_stage(step: int) -> None:
    model = build(warmup_steps=5, noisy_steps=5).train()
    model.step.fill_(step)
    model(clip()).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---- the proposal mixer ------------------------------------------------------------------------------------------


def mixer(particles: int = 5, seed: int = 0) -> ProposalMixer:
    torch.manual_seed(seed)
    return ProposalMixer(4, particles, 8, (8, 8))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 16, 3, 8, 8, generator=generator), 2 * torch.rand(batch, 16, 2, generator=generator) - 1


def test_mixed_anchors_lie_inside_the_convex_hull_of_the_proposals() -> None:
    glimpses, proposals = inputs()
    with torch.no_grad():
        anchors = mixer()(glimpses, proposals)
    assert anchors.shape == (3, 5, 2)
    # inside means: in no direction further out than the furthest proposal
    angle = torch.arange(360) * (torch.pi / 180)
    directions = torch.stack([angle.cos(), angle.sin()])
    furthest = (proposals @ directions).amax(1, keepdim=True)
    assert (anchors @ directions <= furthest + 1e-6).all()
    with torch.no_grad():
        same = mixer()(glimpses, torch.tensor([0.3, -0.7]).expand(3, 16, 2))
    torch.testing.assert_close(same, torch.tensor([0.3, -0.7]).expand(3, 5, 2))


def test_mixed_anchors_equal_their_definition() -> None:
    module, (glimpses, proposals) = mixer(), inputs(batch=1)

    def norm(values: Tensor) -> Tensor:  # layer normalisation as it starts
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    with torch.no_grad():
        tokens = torch.stack(
            [
                torch.cat([module.project_glimpse(module.cnn(glimpse[None]).flatten()), module.project_position(place)])
                for glimpse, place in zip(glimpses[0], proposals[0], strict=True)
            ]
        )
        assert tokens.shape == (16, 128)
        normed = norm(tokens)
        tokens = tokens + torch.stack([module.mix_tokens(normed[:, d]) for d in range(128)], dim=1)
        tokens = tokens + module.mix_channels(norm(tokens))
        logits = module.logits(norm(tokens)) + module.place
        weights = logits.exp() / logits.exp().sum(0)
        expected = torch.stack(
            [torch.stack([weights[n, k] * proposals[0, n] for n in range(16)]).sum(0) for k in range(5)]
        )
        torch.testing.assert_close(module(glimpses, proposals)[0], expected)


def test_mixed_anchors_are_told_apart_by_what_is_seen_and_pass_a_gradient_on() -> None:
    module, (glimpses, proposals) = mixer(), inputs(batch=1)
    glimpses.requires_grad_()
    proposals.requires_grad_()
    module(glimpses, proposals)[:, 2].sum().backward()
    assert glimpses.grad is not None
    assert proposals.grad is not None
    assert glimpses.grad.abs().max() > 0
    assert proposals.grad.abs().max() > 0


def test_mixed_anchors_keep_their_precision_under_bf16() -> None:
    module, (glimpses, proposals) = mixer(), inputs()
    with torch.no_grad():
        exact = module(glimpses, proposals)
        with torch.autocast("cpu", torch.bfloat16):
            anchors = module(glimpses, proposals)
    assert anchors.dtype == torch.float32
    torch.testing.assert_close(anchors, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("particles", [1, 2, 3, 10, 16])
def test_mixed_anchors_start_spread_over_the_image(particles: int) -> None:
    points = spread_points(particles)
    assert points.shape == (particles, 2)
    assert points.min() > 0
    assert points.max() < 1
    torch.testing.assert_close(points.mean(0), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)
    if particles > 1:
        apart = torch.cdist(points, points) + 10 * torch.eye(particles)
        assert apart.min() > 0.7 / particles**0.5
    module = ProposalMixer(8, particles, 8, (8, 8))
    nearest = module.place.argmax(0)
    patches = torch.stack([nearest // 8, nearest % 8], dim=-1)
    torch.testing.assert_close((patches + 0.5) / 8, points, atol=1 / 16 + 1e-6, rtol=0)


def test_without_a_filter_the_prior_gives_one_proposal_per_patch_in_their_order() -> None:
    torch.manual_seed(0)
    prior = PatchPrior(32, 8, (8, 8), 16, "none")
    with torch.no_grad():
        pixels = (prior(clip(t=1)[:, 0]) + 1) / 2 * 31
    patches = torch.cartesian_prod(torch.arange(4), torch.arange(4)) * 8
    assert ((pixels >= patches - 1e-4) & (pixels <= patches + 7 + 1e-4)).all()
    with pytest.raises(ValueError, match="without a filter all 16 proposals are kept, got num_proposals=8"):
        PatchPrior(32, 8, (8, 8), 8, "none")


def test_encoders_deeper_than_a_glimpse_are_refused() -> None:
    with pytest.raises(ValueError, match="prior_channels of 5 levels need glimpses of 16 pixels or more, got 8"):
        DLPConfig(image_size=256, patch_size=32, num_proposals=16, glimpse_ratio=1 / 32, prior_channels=(8,) * 5)
