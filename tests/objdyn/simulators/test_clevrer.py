import json
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from objdyn.clevrer import FUTURE_FRAMES, NUM_FRAMES, Camera, Event, History, Properties
from objdyn.simulators import Episode, clevrer, simulator
from objdyn.simulators.clevrer import HALF, MARGIN, Body, Options, Run, Scene
from objdyn.simulators.clevrer_json import from_scene, to_annotation, to_scene, to_world
from objdyn.simulators.rendering import MujocoRenderer

pytest.importorskip("mujoco")


@pytest.fixture
def opengl() -> None:
    try:
        MujocoRenderer(clevrer.parse("size=16").view)
    except ValueError as error:
        pytest.skip(f"needs OpenGL: {error}")


@pytest.fixture(scope="module")
def runs() -> list[tuple[Scene, Run]]:
    """Videos and the two seconds after them."""
    scenes = [clevrer.draw_scene(seed, (4, 6)) for seed in range(4)]
    return [(scene, clevrer.simulate(scene, NUM_FRAMES + FUTURE_FRAMES)) for scene in scenes]


RED, BLUE, GREEN = (Properties(color, "rubber", "sphere") for color in ("red", "blue", "green"))


def resting(look: Properties, x: float, y: float) -> Body:
    return Body(look, (x, y, HALF), 0.3, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def test_an_object_at_rest_stays() -> None:
    looks = [Properties("red", "metal", shape) for shape in ("cube", "sphere", "cylinder")]
    scene = Scene(tuple(resting(look, 2.0 * i, 0.5) for i, look in enumerate(looks)))
    run = clevrer.simulate(scene, 60)
    np.testing.assert_allclose(run.position, np.broadcast_to(run.position[0], run.position.shape), atol=3e-4)
    assert not run.touching.any()


@pytest.mark.parametrize(
    ("shape", "slowing"),
    [("cube", 0.045 * 9.81), ("cylinder", 0.045 * 9.81), ("sphere", 0.011 * 9.81 / (1.4 * 0.2))],
)
def test_friction_slows_an_object_as_coulomb_says(shape: str, slowing: float) -> None:
    # Gliding: mu g. Rolling: the torque c m g stops a momentum of m v r (1 + 2/5), so c g / (1.4 r).
    spin = (-0.6 / HALF, 0.8 / HALF, 0.0) if shape == "sphere" else (0.0, 0.0, 0.0)
    body = Body(Properties("red", "metal", shape), (0.0, 0.0, HALF), 0.0, (0.8, 0.6, 0.0), spin)
    speed = np.linalg.norm(clevrer.simulate(Scene((body,)), 26).velocity[:, 0, :2], axis=-1)
    assert speed[0] == 1
    assert speed[-1] == pytest.approx(1 - slowing, abs=0.01)


def moving(look: Properties, place: tuple[float, float], velocity: tuple[float, float]) -> Body:
    return Body(look, (*place, HALF), 0.4, (*velocity, 0.0), (0.0, 0.0, 0.5))


@pytest.mark.parametrize("shape", ["cube", "cylinder"])
def test_without_friction_a_collision_keeps_momentum_and_loses_energy(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clevrer, "SLIDING", 0.0)
    monkeypatch.setattr(clevrer, "TURNING", 0.0)
    one, other = (Properties(color, "metal", shape) for color in ("red", "blue"))
    scene = Scene((moving(one, (-0.8, 0.1), (1.5, 0.2)), moving(other, (0.3, 0.0), (-0.4, 0.0))))
    run = clevrer.simulate(scene, 40)
    assert len(clevrer.collisions(run.touching)) == 1
    inertia = HALF**2 * (2 / 3 if shape == "cube" else 1 / 2)
    momentum = run.velocity[..., :2].sum(axis=1)
    arm, v, spin = run.position, run.velocity, run.angular_velocity[..., 2]
    turning = (arm[..., 0] * v[..., 1] - arm[..., 1] * v[..., 0] + inertia * spin).sum(axis=1)
    # MuJoCo's least friction is 1e-5, which takes 1e-4 per second from each.
    np.testing.assert_allclose(momentum, np.broadcast_to([1.1, 0.2], momentum.shape), atol=4e-4)
    np.testing.assert_allclose(turning, turning[0], atol=4e-4)
    energy = (np.square(v).sum(axis=-1) + inertia * np.square(spin)).sum(axis=1)
    assert energy[-1] < 0.97 * energy[0]
    assert v[-1, 1, 0] > 0.3


def test_a_head_on_collision_gives_back_six_tenths_of_the_speed() -> None:
    # A spring of stiffness k and damping b gives back exp(-pi z / sqrt(1 - z^2)) with z = b / 2 sqrt(k), per unit mass.
    ratio = 48 / 2 / math.sqrt(22500)
    one, other = (Properties(color, "metal", "cylinder") for color in ("red", "blue"))
    bodies = (resting(one, 0.0, 0.0), Body(other, (-1.0, 0.0, HALF), 0.0, (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)))
    run = clevrer.simulate(Scene(bodies), 60)
    frames = np.flatnonzero(run.touching[:, 0, 1])
    before, after = (run.velocity[f, 1, 0] - run.velocity[f, 0, 0] for f in (frames[0] - 1, frames[-1] + 1))
    assert -after / before == pytest.approx(math.exp(-math.pi * ratio / math.sqrt(1 - ratio**2)), abs=0.08)


def test_contacts_are_where_round_objects_are_a_diameter_apart(runs: list[tuple[Scene, Run]]) -> None:
    checked = 0
    for scene, run in runs:
        round_ones = [i for i, body in enumerate(scene.bodies) if body.properties.shape != "cube"]
        for i, j in ((i, j) for i in round_ones for j in round_ones if i < j):
            apart = np.linalg.norm((run.position[:, i] - run.position[:, j])[:, :2], axis=-1)
            way = np.linalg.norm(run.velocity[:, i] - run.velocity[:, j], axis=-1) / 25
            touching = run.touching[:, i, j]
            checked += np.count_nonzero(touching)
            # At the end of a frame without contact they are apart; in a frame with one they come close enough.
            assert (apart[~touching] > 2 * HALF - 1e-6).all()
            near = np.minimum(apart[1:] - way[1:], apart[:-1] - way[:-1])
            assert (near[touching[1:]] < 2 * HALF + 1e-6).all()
    assert checked > 5


def test_collisions_are_first_contacts_after_five_frames_apart() -> None:
    random = np.random.default_rng(0)
    touching = random.random((120, 4, 4)) < 0.12
    touching &= touching.transpose(0, 2, 1)
    touching[:, range(4), range(4)] = False
    wanted = set()
    for i in range(4):
        for j in range(i):
            last = None
            for frame in range(120):
                if touching[frame, i, j]:
                    if last is None or frame - last - 1 >= 5:
                        wanted.add(Event("collision", frame, (j, i)))
                    last = frame
    found = clevrer.collisions(touching)
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_objects_go_out_of_view_later_than_they_come_in() -> None:
    # A camera for which (u, v) = (x, y): 101 pixels, so that [-1, 1] is 0.5 to 100.5.
    camera = Camera(np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]), 101, 101)
    place = np.array([-2, -0.6, 0.5, 3, 0.5, 0.0, 0.5 - 50 * MARGIN + 0.01, 0.5 - 50 * MARGIN - 0.01, 0.4, 0.6])
    points = np.stack([place, np.full_like(place, 50.0), np.zeros_like(place)], axis=-1)[:, None]
    seen = clevrer.in_view(points, camera)[:, 0]
    assert seen.tolist() == [False, False, True, True, True, True, True, False, False, True]
    assert clevrer.passages(seen[:, None]) == [Event("in", 2, (0,)), Event("out", 7, (0,)), Event("in", 9, (0,))]


def reached(pair: Sequence[Run], removed: int) -> np.ndarray:
    """The frame from which on each object may be otherwise than without ``removed``, by way of contacts."""
    first = np.full(pair[0].touching.shape[1], len(pair[0].touching))
    first[removed] = 0
    while True:
        before = first.copy()
        for run in pair:
            for frame, i, j in np.argwhere(run.touching):
                if frame >= first[i]:
                    first[j] = min(first[j], frame)
        if (first == before).all():
            return first


def test_a_removed_object_changes_only_what_is_downstream_of_it(runs: list[tuple[Scene, Run]]) -> None:
    unchanged = changed = 0
    for scene, run in runs:
        camera = scene.view.camera
        true = clevrer.history(run, camera)
        for i in range(len(scene.bodies)):
            other = clevrer.simulate(scene, NUM_FRAMES + FUTURE_FRAMES, [i])
            first = reached((run, other), i)
            for j in set(range(len(scene.bodies))) - {i}:
                np.testing.assert_allclose(other.position[: first[j], j], run.position[: first[j], j], atol=1e-5)
            events = clevrer.history(other, camera).events
            upstream, kept = (
                [event for event in each if event.frame < first[list(event.objects)].min()]
                for each in (true.events, events)
            )
            assert kept == upstream
            assert not any(i in event.objects for event in events)
            unchanged += len(kept)
            changed += set(events) != {event for event in true.events if i not in event.objects}
    assert unchanged > 100
    assert changed > 5


def test_what_is_imagined_is_what_simulations_say() -> None:
    scene = clevrer.draw_scene(3, (3, 3))
    imagined = clevrer.imagine(scene, 17)
    assert imagined is not None
    world, run = imagined
    assert world.scene_index == 17
    assert world.history == clevrer.history(clevrer.simulate(scene, 179), scene.view.camera)
    assert set(world.without) == {0, 1, 2}
    for i, history in world.without.items():
        assert history == clevrer.history(clevrer.simulate(scene, 179, [i]), scene.view.camera)
    still = [body.velocity == (0.0, 0.0, 0.0) for body in scene.bodies]
    assert world.moving(0).tolist() == [not each for each in still]
    np.testing.assert_array_equal(world.motion.location, run.position)
    yaw = [math.remainder(body.yaw, 2 * math.pi) for body in scene.bodies]
    np.testing.assert_allclose(world.motion.orientation[0], [[0, 0, angle] for angle in yaw], atol=1e-12)


def test_a_scene_that_chance_decides_is_not_imagined() -> None:
    def passing(y: float, seed: int = 0) -> Scene:
        return Scene((resting(BLUE, 0.0, 0.0), moving(RED, (-1.0, y), (1.5, 0.0))), seed)

    hit, missed = 0.3, 0.5
    while missed - hit > 1e-12:
        middle = (hit + missed) / 2
        hit, missed = (middle, missed) if clevrer.simulate(passing(middle), 40).touching.any() else (hit, middle)
    assert hit == pytest.approx(2 * HALF, abs=1e-3)
    assert clevrer.imagine(passing(hit - 0.1), 0) is not None
    # At the edge noise decides, for about every other seed.
    assert any(clevrer.imagine(passing(hit, seed), 0) is None for seed in range(12))


def test_a_scene_file_repeats_the_run_bit_by_bit() -> None:
    scene = clevrer.draw_scene(2**64 - 1, (4, 4))
    imagined = clevrer.imagine(scene, 3)
    assert imagined is not None
    world, run = imagined
    content = json.loads(json.dumps(to_scene(scene, world)))
    file = from_scene(content)
    assert file.scene == scene
    again = clevrer.simulate(file.scene, NUM_FRAMES + FUTURE_FRAMES)
    for one, other in zip(run, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(file.camera.matrix, scene.view.camera.matrix)
    events = world.history.events
    annotation = json.loads(json.dumps(to_annotation(3, world.properties, world.motion, events, world.shown)))
    read = to_world(content, annotation)
    assert (read.properties, read.history, read.without) == (world.properties, world.history, world.without)
    np.testing.assert_array_equal(read.motion.velocity, world.motion.velocity[:NUM_FRAMES])


def test_an_annotation_has_clevrers_schema() -> None:
    imagined = clevrer.imagine(clevrer.draw_scene(5, (3, 3)), 20_001)
    assert imagined is not None
    world = imagined[0]
    annotation = to_annotation(20_001, world.properties, world.motion, world.history.events, world.shown)
    assert list(annotation) == [
        "scene_index", "video_filename", "object_property", "motion_trajectory", "collision",
    ]  # fmt: skip
    assert annotation["video_filename"] == "video_20001.mp4"
    assert set(annotation["object_property"][0]) == {"object_id", "color", "material", "shape"}
    assert [frame["frame_id"] for frame in annotation["motion_trajectory"]] == list(range(128))
    assert all(len(frame["objects"]) == 3 for frame in annotation["motion_trajectory"])
    assert set(annotation["motion_trajectory"][0]["objects"][0]) == {
        "object_id", "location", "orientation", "velocity", "angular_velocity", "inside_camera_view",
    }  # fmt: skip
    for collision in annotation["collision"]:
        centres = world.motion.location[collision["frame_id"], collision["object_ids"]]
        assert np.linalg.norm(centres - collision["location"], axis=-1) == pytest.approx([0.2, 0.2], abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema.*version 1"),
        ({"objects": [{"color": "pink", "material": "metal", "shape": "cube"}]}, "objects.*pink"),
        ({"objects": []}, "seed.*at least one object"),
        ({"seed": -1}, "seed.*whole number"),
        ({"view": {}}, "view.*missing"),
        ({"camera": {"matrix": [[1, 2, 3, 4]], "width": 1, "height": 1}}, "camera.*3 rows"),
        ({"events": [{"kind": "out", "frame": 3, "objects": [9]}]}, "events.*no such event"),
        ({"without": {"7": []}}, "without.*ids"),
    ],
)
def test_a_damaged_scene_file_is_refused(change: dict[str, Any], message: str) -> None:
    imagined = clevrer.imagine(Scene((resting(RED, 0.0, 0.0),)), 0)
    assert imagined is not None
    content = to_scene(Scene((resting(RED, 0.0, 0.0),)), imagined[0])
    assert from_scene(content).shown == NUM_FRAMES
    with pytest.raises(ValueError, match=message):
        from_scene(content | change)


@pytest.mark.usefixtures("opengl")
def test_frames_and_annotations_are_the_same_in_two_processes() -> None:
    program = """
import hashlib, json
from objdyn.simulators import clevrer, clevrer_json, simulator
(episode,) = simulator("clevrer-sim:objects=5,size=32,stride=16").episodes("test", 4, 1, None)
clip = episode.clip()
digest = hashlib.sha256(clip.frames.tobytes())
for name in sorted(clip.truth):
    digest.update(clip.truth[name].tobytes())
scene, run = episode.simulated
motion, events = clevrer.to_motion(run, scene.view.camera), clevrer.history(run, scene.view.camera).events
digest.update(json.dumps(clevrer_json.to_annotation(0, scene.properties, motion, events, 128)).encode())
print(digest.hexdigest())
"""
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (process.communicate()[0].strip() for process in started)
    assert len(one) == 64
    assert one == other


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize("fit", ["center-crop", "squeeze"])
def test_a_clip_says_where_its_objects_are(fit: str) -> None:
    options = Options(objects=(3, 5), size=48, stride=4, frames=32, fit=fit)
    for episode in clevrer.episodes(options, "train", 0, 3):
        clip = episode.clip(2, 28)
        truth, n = clip.truth, len(episode.simulated[0].bodies)
        assert truth["num_objects"] == truth["present"].any(axis=0).sum()
        assert truth["positions"].shape == truth["velocities"].shape == (28, 5, 2)
        assert not truth["present"][:, n:].any()
        assert truth["segmentation"].max() <= n
        hits = total = 0
        for frame in range(28):
            seen = np.flatnonzero(truth["present"][frame])
            y, x = ((truth["positions"][frame, seen].T + 1) / 2 * 47).round().astype(int)
            inside = (np.minimum(y, x) >= 0) & (np.maximum(y, x) <= 47)
            hits += np.count_nonzero(truth["segmentation"][frame, y[inside], x[inside]] == seen[inside] + 1)
            total += np.count_nonzero(inside)
        assert hits > 0.85 * total > 20  # others hide the rest
        # Between frames without a collision a velocity is half way from one difference to the next.
        present, hit = truth["present"], np.zeros(truth["present"].shape, bool)
        for event in clevrer.collisions(episode.simulated[1].touching):
            # The first kept frame that shows it; the clip's first is frame 2 x 4 of the video.
            if 0 <= (at := -(-event.frame // 4) - 2) < 28:
                hit[at, list(event.objects)] = True
        calm = present[2:] & present[1:-1] & present[:-2] & ~hit[1:-1] & ~hit[2:]
        change = (truth["positions"][2:] - truth["positions"][:-2]) / 2
        assert np.abs(change - truth["velocities"][1:-1])[calm].max() < 0.02
        assert np.abs(change)[calm].max() > 0.05


@pytest.mark.usefixtures("opengl")
def test_windows_of_an_episode_are_parts_of_it() -> None:
    (episode,) = clevrer.episodes(Options(objects=(3, 3), size=16, stride=16, frames=8), "val", 1, 1)
    whole, part = episode.clip(), episode.clip(3, 4)
    cut = whole.window(3, 4)
    assert (part.start_frame, part.fps, part.stride) == (cut.start_frame, cut.fps, cut.stride) == (3, 25 / 16, 1)
    np.testing.assert_array_equal(part.frames, cut.frames)
    for name in part.truth.keys() - {"num_objects"}:
        np.testing.assert_array_equal(part.truth[name], cut.truth[name])
    assert whole.truth["num_objects"] == 3  # in all frames; fewer may be seen in four of them
    assert part.truth["num_objects"] == part.truth["present"].any(axis=0).sum()


def test_videos_show_their_objects_and_collisions() -> None:
    numbers = set()
    for seed in range(6):
        scene, run = clevrer.draw_run(seed)
        n = len(scene.bodies)
        numbers.add(n)
        seen = clevrer.in_view(run.position, scene.view.camera)
        assert len(set(scene.properties)) == n
        assert seen.any(axis=0).all()
        assert len(clevrer.collisions(run.touching)) >= 1
        start = np.linalg.norm(run.position[0][:, None] - run.position[0], axis=-1)[~np.eye(n, dtype=bool)]
        assert start.min() >= 2 * math.sqrt(2) * HALF  # the diagonals of two cubes: nothing overlaps at the start
        still = np.linalg.norm(run.velocity[0], axis=-1) == 0
        assert still.any()
        assert not still.all()
        assert seen[0, still].all()
        assert not seen[0, ~still].any()
    assert numbers <= {3, 4, 5, 6}
    assert len(numbers) > 1


def test_a_video_depends_on_its_number_and_not_on_its_neighbours() -> None:
    many = clevrer.episodes(Options(objects=(3, 3)), "val", 0, 4)
    (alone,) = clevrer.episodes(Options(objects=(3, 3), size=32), "val", 2, 1)
    assert isinstance(many[2], Episode)
    assert many[2].key == "val-000002"
    assert many[2].simulated[0] == alone.simulated[0] != many[1].simulated[0]


def test_options_have_one_name_and_one_meaning() -> None:
    chosen = simulator("clevrer-sim:objects=3,size=32,stride=4")
    assert chosen.name == (
        "clevrer-sim:objects=3,size=32,stride=4,frames=32,fit=center-crop,crop=320,renderer=mujoco,seed=0"
    )
    assert (chosen.num_frames, chosen.height, chosen.width, chosen.fps) == (32, 32, 32, 6.25)
    assert clevrer.parse(chosen.name.partition(":")[2]) == clevrer.parse("objects=3,size=32,stride=4")
    assert simulator("clevrer-sim").num_frames == NUM_FRAMES


@pytest.mark.parametrize(
    "text",
    ["objects=0", "objects=4-3", "size=4", "stride=0", "stride=129", "stride=4,frames=33", "fit=whole", "crop=321"],
)
def test_impossible_options_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"got|wants"):
        clevrer.parse(text)


def test_a_clip_outside_the_episode_is_refused() -> None:
    (episode,) = clevrer.episodes(Options(stride=4, frames=8), "train", 0, 1)
    with pytest.raises(ValueError, match="8 frames"):
        episode.clip(6, 3)
    with pytest.raises(ValueError, match="10000 episodes"):
        clevrer.episodes(Options(), "train", 9_999, 2)


def test_an_event_that_noise_moves_over_the_videos_end_is_chance() -> None:
    def at(frame: int) -> History:
        return History((Event("collision", frame, (0, 1)),))

    assert clevrer._same(at(100), at(101))
    assert not clevrer._same(at(100), at(102))
    assert not clevrer._same(at(NUM_FRAMES - 1), at(NUM_FRAMES))
    assert clevrer._same(at(NUM_FRAMES), at(NUM_FRAMES + 1))
