"""Edits of particles: what they select, what they change in the picture, and what is refused."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from objdyn.interface import Scene
from objdyn.layers.spatial import pixel_axis
from objdyn.models import what_if
from objdyn.models.ddlp import DDLP, DDLPConfig
from objdyn.models.dlp import Particles
from objdyn.models.what_if import Edit, apply, concerns, parse_edits, rollout, select

SIDE, FRAMES = 64, 3
RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def make_particles(
    *places: tuple[float, float], colours: Any = (), depth: Any = (), transparency: Any = (), moves: Any = ()
) -> Particles:
    """One clip with a particle at each place, which ``moves`` shift from frame to frame."""
    k = len(places)
    start = torch.tensor(places).view(1, 1, k, 2)
    step = torch.tensor(moves or [(0.0, 0.0)] * k).view(1, 1, k, 2)
    look = torch.tensor(colours or [RED] * k).view(1, 1, k, 3)
    return Particles(
        position=start + step * torch.arange(FRAMES).view(1, FRAMES, 1, 1),
        scale=torch.full((1, FRAMES, k, 2), math.log(0.25 / 0.75)),  # a quarter of the frame
        depth=torch.tensor(depth or [0.0] * k).expand(1, FRAMES, k).clone(),
        transparency=torch.tensor(transparency or [1.0] * k).expand(1, FRAMES, k).clone(),
        features=look.expand(1, FRAMES, k, 3).clone(),
        background=torch.zeros(1, FRAMES, 3),
    )


@pytest.fixture
def model() -> DDLP:
    """A model whose particles are round blobs in the colour of their features, on a grey background."""
    torch.manual_seed(0)
    config = DDLPConfig(
        num_particles=3, prior_channels=(4, 4, 4), encoder_channels=(4, 4, 4), pint_dim=16, pint_layers=1, pint_heads=2,
        max_frames=4, burn_in_frames=2,
    )  # fmt: skip
    model = DDLP(config).eval()
    axis = pixel_axis(config.glimpse_size, torch.zeros(1))
    blob = (-4 * (axis[:, None] ** 2 + axis**2)).exp()

    def paint(features: Tensor) -> Tensor:
        colour = features[:, :, None, None].expand(-1, 3, *blob.shape)
        return torch.cat([blob.expand(len(features), 1, -1, -1), colour], dim=1)

    model.glimpse_decoder.forward = paint  # type: ignore[method-assign]
    model.background_decoder.forward = lambda z: torch.full((len(z), 3, SIDE, SIDE), 0.5)  # type: ignore[method-assign]
    return model


def render(model: DDLP, latents: Particles) -> Scene:
    with torch.no_grad():
        return model.decode(latents, components=True)


def centroid(mask: Tensor) -> Tensor:
    """Centre of mass (y, x) of a mask (h, w), in pixels."""
    rows = torch.arange(mask.shape[0], dtype=mask.dtype)
    return torch.stack([(mask.sum(1) @ rows), (mask.sum(0) @ rows)]) / mask.sum()


# What is selected


def test_indices_and_all_select_by_number():
    latents = make_particles((0, 0), (0.5, 0), (0, 0.5))
    assert select(latents, "index:1").tolist() == [[False, True, False]]
    assert select(latents, "index:2, 0").tolist() == [[True, False, True]]
    assert select(latents, "all").tolist() == [[True] * 3]


def test_nearest_takes_the_nearest_visible_particle_of_the_frame():
    latents = make_particles(
        (0, 0), (0.1, 0), (0.8, 0.8), transparency=[1, 0.05, 1], moves=[(0.4, 0.4), (0, 0), (-0.4, -0.4)]
    )
    assert select(latents, "nearest:0.1,0").tolist() == [[True, False, False]]
    assert select(latents, "nearest:0.1,0", frame=-1).tolist() == [[False, False, True]]


def test_each_clip_of_a_batch_has_its_own_selection():
    one, two = make_particles((0, 0), (0.5, 0)), make_particles((0.5, 0), (0, 0))
    both = Particles(*(torch.cat(pair) for pair in zip(one, two, strict=True)))
    assert select(both, "nearest:0,0").tolist() == [[True, False], [False, True]]


def test_cluster_takes_exactly_the_particles_on_one_object():
    on, beside, passing = (0.2001, 0.1), (0.2, 0.45), (0.2, 0.18)
    latents = make_particles(
        (0.2, 0.1), on, beside, passing, (0.2, 0.1), (0.24, 0.06),
        transparency=[1, 1, 1, 1, 0.0, 1],
        moves=[(0.1, 0), (0.1, 0), (0.1, 0), (0.02, 0), (0.1, 0), (0.1, 0)],
    )  # fmt: skip
    # The unseen one on the object belongs to it; one that another object carries past it does not.
    assert select(latents, "cluster:0.21,0.1").tolist() == [[True, True, False, False, True, True]]
    assert select(latents, "cluster:0.21,0.1", radius=0.01).tolist() == [[True, True, False, False, True, False]]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            "index:3",
            r"no particle 3; there are 3 \(0 to 2\), of which are visible in frame 0: 0 at \(0.00, 0.00\), 2 at",
        ),
        (
            "nearest:-0.9,-0.9",
            r"no visible particle lies within 0.5 of \(-0.9, -0.9\); there are 3 .* 2 at \(0.50, 0.00\)$",
        ),
        ("cluster:-0.9,-0.9", "no visible particle lies within"),
        ("index:", "'index:' selects nothing; write index:3"),
        ("index:-1", "selects nothing"),
        ("nearest:0.1", "selects nothing"),
        ("nearest:nan,0", "selects nothing"),
        ("ball", "selects nothing"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(selection: str, message: str):
    latents = make_particles((0, 0), (-0.8, -0.8), (0.5, 0), transparency=[1, 0, 1])
    with pytest.raises(ValueError, match=message):
        select(latents, selection)


def test_a_frame_that_is_not_in_the_context_is_refused():
    with pytest.raises(ValueError, match="no context frame 3; there are 3, 0 to 2"):
        select(make_particles((0, 0)), "nearest:0,0", frame=3)


# What changes


@pytest.mark.parametrize("move", [(0.2, 0.0), (-0.1, 0.15)])
def test_a_moved_object_is_seen_moved_by_that_amount_within_a_pixel(model: DDLP, move: tuple[float, float]):
    latents = make_particles((0, 0), (-0.7, -0.7), moves=[(0.05, 0), (0, -0.02)])
    before, after = (render(model, z) for z in (latents, apply(latents, [Edit("index:0", move=move)]).latents))
    assert before.masks is not None
    assert after.masks is not None
    for t in range(FRAMES):
        shift = centroid(after.masks[0, t, 1, 0]) - centroid(before.masks[0, t, 1, 0])
        torch.testing.assert_close(shift, torch.tensor(move) * (SIDE - 1) / 2, atol=0.5, rtol=0)
        torch.testing.assert_close(after.masks[0, t, 2], before.masks[0, t, 2], atol=1e-3, rtol=0)


def test_a_removed_object_leaves_the_background(model: DDLP):
    latents = make_particles((0, 0), (0.05, 0.05), (0.7, 0.7))
    edited = apply(latents, [Edit("cluster:0,0", remove=True)])
    without = render(model, edited.latents).video
    alone = make_particles((0.7, 0.7))
    torch.testing.assert_close(without, render(model, alone).video)
    assert (without[0, :, :, :40, :40] == 0.5).all()
    assert edited.held.tolist() == [[True, True, False]]


def test_a_scaled_object_is_so_much_larger(model: DDLP):
    latents = make_particles((0, 0))
    masks = [render(model, z).masks for z in (latents, apply(latents, [Edit("all", scale=1.5)]).latents)]
    areas = [float(mask[0, 0, 1].sum()) for mask in masks if mask is not None]
    assert areas[1] / areas[0] == pytest.approx(1.5**2, rel=0.05)


@pytest.mark.parametrize("depth", [[0.0, 0.0], [2.0, -3.0], [-4.0, 4.0], [-6.0, -6.0]])
def test_front_and_behind_change_who_covers_whom(model: DDLP, depth: list[float]):
    latents = make_particles((0, 0), (0, 0), (0.7, 0.7), colours=[RED, GREEN, RED], depth=[*depth, 0.5])
    for front, winner in ((True, RED), (False, GREEN)):
        after = apply(latents, [Edit("index:0", front=front, behind=not front)]).latents
        others = after.depth[..., 1:]
        assert (after.depth[..., :1] < others).all() if front else (after.depth[..., :1] > others).all()
        middle = render(model, after).video[0, :, :, SIDE // 2, SIDE // 2]
        torch.testing.assert_close(middle, torch.tensor(winner).expand(FRAMES, 3), atol=0.1, rtol=0)
        weights = [torch.sigmoid(-z.depth) for z in (latents, after)]
        ratios = [weight[..., 1] / weight[..., 2] for weight in weights]
        torch.testing.assert_close(*ratios, rtol=1e-3, atol=0)  # the others blend as before


def test_swap_exchanges_looks_and_on_request_sizes(model: DDLP):
    latents = make_particles((0, 0), (0.6, 0.6), (0.6, 0.6), colours=[RED, GREEN, GREEN])
    latents.scale[:, :, 1:] = 0.0
    look = apply(latents, [Edit("nearest:0,0", swap="cluster:0.6,0.6")]).latents
    torch.testing.assert_close(look.features[0, 0], torch.tensor([GREEN, RED, RED]))
    assert torch.equal(look.scale, latents.scale)
    assert render(model, look).video[0, 0, :, 31, 31].argmax() == 1
    both = apply(latents, [Edit("nearest:0,0", swap="cluster:0.6,0.6", swap_scale=True)]).latents
    assert torch.equal(both.scale[:, :, 0], latents.scale[:, :, 1])
    assert torch.equal(both.scale[:, :, 1], latents.scale[:, :, 0])
    again = apply(both, [Edit("nearest:0,0", swap="cluster:0.6,0.6", swap_scale=True)]).latents
    assert all(torch.equal(a, b) for a, b in zip(again, latents, strict=True))
    with pytest.raises(ValueError, match="swaps particles with themselves"):
        apply(latents, [Edit("index:1", swap="cluster:0.6,0.6")])


def test_front_of_nothing_is_refused():
    with pytest.raises(ValueError, match="puts all particles in front, and there are no others"):
        apply(make_particles((0, 0)), [Edit("all", front=True)])


def test_selections_are_made_before_anything_changes_and_latents_stay():
    latents = make_particles((0, 0), (0.2, 0))
    copies = [field.clone() for field in latents]
    edits = [Edit("nearest:0,0", move=(0.2, 0)), Edit("nearest:0,0", fade=0.5)]
    after = apply(latents, edits).latents
    torch.testing.assert_close(after.position[0, 0], torch.tensor([[0.2, 0], [0.2, 0]]))
    assert after.transparency[0, 0].tolist() == [0.5, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(latents, copies, strict=True))


# What follows


def test_the_future_is_pints_and_what_is_removed_stays_away(model: DDLP):
    latents = make_particles((0, 0), (0.3, 0.3), (-0.4, 0))
    with torch.no_grad():
        moved = apply(latents, [Edit("index:0", move=(0.1, 0))])
        assert all(
            torch.equal(a, b) for a, b in zip(rollout(model, moved, 4), model.rollout(moved.latents, 4), strict=True)
        )
        assert not torch.equal(rollout(model, moved, 4).position, model.rollout(latents, 4).position)
        plain = model.rollout(latents, 6)
        faded = apply(latents, [Edit("index:1", remove=True), Edit("index:2", fade=0.25)])
        future = rollout(model, faded, 6)
    assert future.depth.shape == (1, 6, 3)
    assert (plain.transparency[:, :, 1:] > 0.26).all()  # what PINT says of itself
    assert (future.transparency[:, :, 1] == 0).all()
    assert (future.transparency[:, :, 2] == 0.25).all()
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        rollout(model, faded, 0)


def test_a_held_future_is_the_plain_one_where_nothing_is_held(model: DDLP):
    """Step by step or at once, the same draws."""
    latents = make_particles((0, 0), (0.3, 0.3), (-0.4, 0))
    same = what_if.Edited(latents, torch.tensor([[False, True, False]]))
    with torch.no_grad():
        plain = model.rollout(latents, 1, generator=torch.Generator().manual_seed(0))
        held = rollout(model, same, 1, generator=torch.Generator().manual_seed(0))
    for name, field in plain._asdict().items():
        if name != "transparency":
            assert torch.equal(field, getattr(held, name))


# Warnings, and edits as JSON


@pytest.mark.parametrize(
    ("edit", "warning"),
    [
        (Edit("index:0", move=(0.1, 0)), None),
        (Edit("index:0", move=(0.1, -0.17)), None),
        (Edit("index:0", move=(0.2, -0.2)), "a move by 0.283 is larger than 0.2"),
        (Edit("index:0", move=(0.3, 0)), "a move by 0.3 is larger than 0.2"),
        (Edit("index:2", move=(0.2, 0)), "particle 2 outside the frame in 2 of 3 frames"),
        (Edit("index:0", scale=3), r"a factor of 3 on the size is outside \[0.5, 2\]"),
        (Edit("index:3", move=(0.1, 0)), "nothing that is selected can be seen"),
        (Edit("index:1", move=(0.1, 0)), "particle 4 sits on the same object and not selected; cluster:y,x takes"),
        (Edit("index:0", front=True), "depths change by up to"),
        (Edit("index:0", remove=True), None),
    ],
)
def test_edits_that_leave_the_training_distribution_warn(edit: Edit, warning: str | None):
    places = ((0, 0), (0.5, 0.5), (0.78, 0), (-0.5, -0.5), (0.5, 0.501))
    latents = make_particles(
        *places, transparency=[1, 1, 1, 0, 1], depth=[-2.0] * 5, moves=[(0, 0)] * 2 + [(0.05, 0)] + [(0, 0)] * 2
    )
    found = concerns(latents, edit)
    if warning is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(warning, found[0])


def test_an_edit_survives_json():
    edits = (
        Edit("cluster:0.1,-0.2", move=(0.2, 0.0), name="down"),
        Edit("index:1,2", scale=0.5, fade=0.5, front=True, frame=-1, radius=0.05, name="one", clip="clip-1"),
        Edit("nearest:0,0", swap="index:2", swap_scale=True, behind=True, remove=True, name="two"),
    )
    assert parse_edits(json.dumps([edit.to_json() for edit in edits])) == edits
    assert edits[0].to_json() == {"name": "down", "select": "cluster:0.1,-0.2", "move": [0.2, 0.0]}
    for field in dataclasses.fields(Edit):
        assert field.name in edits[1].to_json() or field.name in edits[2].to_json() or field.name == "move"


ONE = {"name": "a", "select": "index:0", "remove": True}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[", "not JSON"),
        ("{}", "wanted a JSON list"),
        ("[]", "wanted a JSON list"),
        ([ONE, 3], "entry 1: an edit is a JSON object"),
        ([{**ONE, "moove": [0, 1]}], "entry 0: an edit has no field 'moove'; it has select, move"),
        ([{"name": "a", "remove": True}], "needs select, got only name, remove"),
        ([{**ONE, "move": [1]}], r"move of an edit is two numbers \[y, x\], got \[1\]"),
        ([{**ONE, "scale": "2"}], 'scale of an edit is a number, got "2"'),
        ([{**ONE, "remove": 1}], "remove of an edit is true or false, got 1"),
        ([{**ONE, "frame": True}], "frame of an edit is a whole number, got true"),
        ([{**ONE, "scale": math.inf}], "finite"),
        ([{**ONE, "scale": 10**400}], "scale of an edit is a number, got 1000"),
        ("[" * 100_000, "not JSON"),
        ([{**ONE, "scale": 0}], "must be positive"),
        ([{**ONE, "fade": 2}], "fade is a factor from 0"),
        ([{**ONE, "front": True, "behind": True}], "exclude each other"),
        ([{**ONE, "swap_scale": True}], "swap_scale needs swap"),
        ([{"name": "a", "select": "index:0"}], "edit a changes nothing"),
        ([{**ONE, "name": "../a"}], "an edit's name has 1 to 100 letters"),
        ([{**ONE, "name": ""}], "an edit's name has"),
        ([{**ONE, "select": "ball"}], "entry 0: edit a: 'ball' selects nothing"),
        ([ONE, ONE], "entry 1: the name 'a' comes twice"),
        ([ONE, {**ONE, "clip": "c"}], "entry 1: the name 'a' comes twice"),
        ([{**ONE, "clip": "c"}, ONE], "entry 1: the name 'a' comes twice"),
        ([{**ONE, "clip": "c"}, {**ONE, "clip": "c"}], "the name 'a' comes twice for clip c"),
    ],
)
def test_a_wrong_list_of_edits_is_refused_with_the_entry(entries: Any, message: str):
    with pytest.raises(ValueError, match=message):
        parse_edits(entries if isinstance(entries, str) else json.dumps(entries))


def test_a_name_may_come_again_for_another_clip():
    edits = parse_edits(json.dumps([{**ONE, "clip": "c"}, {**ONE, "clip": "d"}]))
    assert [(edit.is_for("c"), edit.is_for("d")) for edit in edits] == [(True, False), (False, True)]
