import importlib
import sys
from typing import Any

import numpy as np
import pytest

from objdyn.simulators import rendering
from objdyn.simulators.rendering import MAX_SOLIDS, RGB, Renderer, Solid, View, renderer

WHOLE = View((3.5, -3.1, 3.05), (0.0, 0.0, 0.0), 33.9, width=120, height=80)
SQUEEZED = View((3.5, -3.1, 3.05), (0.0, 0.0, 0.0), 33.9, width=64, height=64)
CROPPED = View((3.5, -3.1, 3.05), (0.0, 0.0, 0.0), 33.9, width=64, height=64, aspect=1.0)


def draw(view: View, solids: list[Solid], name: str = "mujoco") -> rendering.Picture:
    pytest.importorskip(name)
    try:
        painter: Renderer = renderer(name, view)
    except ValueError as error:
        pytest.skip(f"needs OpenGL: {error}")
    return painter.draw(solids)


def solid(shape: str, x: float, y: float, color: str = "red", material: str = "rubber", turn: float = 0.0) -> Solid:
    cos, sin = np.cos(turn), np.sin(turn)
    return Solid(
        shape, color, material, 0.2, np.array([x, y, 0.2]), np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    )


SCENE = [
    solid("cube", 0.4, -0.6, "gray", "metal", 0.3),
    solid("sphere", -0.8, 0.3, "cyan"),
    solid("cylinder", 0.6, 0.6, "red", "metal"),
]


@pytest.mark.parametrize("view", [WHOLE, SQUEEZED, CROPPED], ids=["whole", "squeezed", "cropped"])
def test_the_mask_of_a_sphere_is_where_rays_meet_it(view: View) -> None:
    ball = solid("sphere", 0.2, 0.1)
    mask = draw(view, [ball]).mask
    # The ray of a pixel's middle: points p with matrix (p, 1) along (u, v, 1).
    matrix = view.camera.matrix
    eye = -np.linalg.solve(matrix[:, :3], matrix[:, 3])
    v, u = np.mgrid[: view.height, : view.width] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(matrix[:, :3]).T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    apart = np.linalg.norm(np.cross(rays, ball.position - eye), axis=-1)
    pixel = np.abs(apart - 0.2) < 0.002  # the renderer's sphere is a polyhedron, flatter by up to 0.001
    assert np.count_nonzero(mask) > 20
    np.testing.assert_array_equal((mask == 1)[~pixel], (apart < 0.2)[~pixel])
    assert np.count_nonzero(pixel) < 0.05 * np.count_nonzero(mask) + 4


@pytest.mark.parametrize("view", [WHOLE, SQUEEZED, CROPPED], ids=["whole", "squeezed", "cropped"])
def test_centres_project_into_their_masks(view: View) -> None:
    picture = draw(view, SCENE)
    y, x = view.camera.project(np.stack([each.position for each in SCENE])).T
    rows, columns = (np.rint((c + 1) / 2 * (n - 1)).astype(int) for c, n in ((y, view.height), (x, view.width)))
    assert picture.mask[rows, columns].tolist() == [1, 2, 3]
    assert picture.frame.shape == (view.height, view.width, 3)


def test_a_squeezed_view_shows_the_same_as_a_whole_one() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (20, 3))
    one, other = (view.camera.project(points) for view in (WHOLE, SQUEEZED))
    pixels = [(p + 1) / 2 * (np.array([v.height, v.width]) - 1) + 0.5 for p, v in ((one, WHOLE), (other, SQUEEZED))]
    np.testing.assert_allclose(pixels[0] / [80, 120], pixels[1] / [64, 64], atol=1e-12)


def test_a_cropped_view_is_the_middle_of_a_whole_one() -> None:
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3))
    small = View(WHOLE.position, WHOLE.target, WHOLE.fov_y, width=80, height=80, aspect=1.0)
    whole, middle = ((view.camera.project(points) + 1) / 2 for view in (WHOLE, small))
    np.testing.assert_allclose(whole[:, 1] * 119 - 20, middle[:, 1] * 79, atol=1e-9)
    picture, part = draw(WHOLE, SCENE), draw(small, SCENE)
    assert np.mean(picture.mask[:, 20:100] == part.mask) > 0.998


def test_frames_do_not_depend_on_what_was_drawn_before() -> None:
    first = draw(CROPPED, SCENE)
    draw(WHOLE, SCENE[:1])
    draw(CROPPED, SCENE[1:])
    again = draw(CROPPED, SCENE)
    np.testing.assert_array_equal(first.frame, again.frame)
    np.testing.assert_array_equal(first.mask, again.mask)


def test_colours_and_materials_can_be_told_apart() -> None:
    means = []
    for color in RGB:
        for material in ("metal", "rubber"):
            picture = draw(CROPPED, [solid("cube", 0.0, 0.0, color, material)])
            means.append(picture.frame[picture.mask == 1].mean(axis=0))
    gaps = np.linalg.norm(np.array(means)[:, None] - np.array(means), axis=-1)
    assert gaps[~np.eye(len(means), dtype=bool)].min() > 8


def test_mitsuba_sees_solids_where_mujoco_does() -> None:
    view = View(WHOLE.position, WHOLE.target, WHOLE.fov_y, width=60, height=40)
    one, other = (draw(view, SCENE, name) for name in ("mitsuba", "mujoco"))
    assert one.frame.shape == other.frame.shape
    assert one.frame.dtype == np.uint8
    assert np.mean(one.mask == other.mask) > 0.98
    floor = (one.mask == 0) & (other.mask == 0)
    assert abs(one.frame[floor].mean() - other.frame[floor].mean()) < 40


def test_too_many_solids_are_refused() -> None:
    with pytest.raises(ValueError, match="room for 254"):
        draw(CROPPED, SCENE[:1] * (MAX_SOLIDS + 1))


def test_without_opengl_the_message_names_packages_and_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    load = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name in ("mujoco.egl", "mujoco.osmesa"):
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=r"MUJOCO_GL=\w+.*libegl1.*libosmesa6.*renderer=mitsuba.*sim3d-mitsuba"):
        rendering.MujocoRenderer(WHOLE)


@pytest.mark.parametrize(("module", "extra"), [("mujoco", "sim3d"), ("mitsuba", "sim3d-mitsuba")])
def test_a_missing_package_is_named_with_its_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{module} is not installed; pip install 'objdyn\[{extra}\]'"):
        rendering.RENDERERS[module](WHOLE)


def test_an_unknown_renderer_and_an_impossible_view_are_refused() -> None:
    with pytest.raises(ValueError, match="mujoco, mitsuba"):
        renderer("blender", WHOLE)
    with pytest.raises(ValueError, match="fov_y=180"):
        View((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 180.0)
