import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from objdyn import figures


def black(t: int = 2, side: int = 8) -> np.ndarray:
    return np.zeros((t, side, side, 3), dtype=np.uint8)


def at(y: float, x: float, t: int = 1) -> np.ndarray:
    return np.tile(np.array([y, x]), (t, 1, 1))


def bright(picture: np.ndarray) -> tuple[float, float]:
    """Centre of mass (y, x) of what is not black."""
    ys, xs = np.nonzero(picture.sum(axis=-1))
    return float(ys.mean()), float(xs.mean())


def test_colour_of_an_object_does_not_depend_on_how_many_there_are():
    many = figures.colours(40)
    np.testing.assert_array_equal(figures.colours(3), many[:3])
    assert len({tuple(c) for c in many.tolist()}) == 40
    assert figures.colours(0).shape == (0, 3)


def test_upscale_repeats_pixels_and_makes_grey_rgb():
    grey = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    large = figures.upscale(grey, 3)
    assert large.shape == (1, 6, 6, 3)
    assert (large[0, :3, 3:] == 1).all()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        figures.upscale(grey, 0)


@pytest.mark.parametrize(("y", "x", "row", "column"), [(-1, -1, 1.5, 1.5), (-1, 1, 1.5, 29.5), (0, 0, 15.5, 15.5)])
def test_particle_is_drawn_at_the_centre_of_its_pixel(y: float, x: float, row: float, column: float):
    drawn = figures.draw_particles(black(1), at(y, x), factor=4)
    inside = drawn[0][max(0, round(row) - 1) : round(row) + 1, max(0, round(column) - 1) : round(column) + 1]
    np.testing.assert_array_equal(inside.reshape(-1, 3), np.tile(figures.colours(1), (len(inside.reshape(-1, 3)), 1)))
    if y == x == 0:
        assert bright(drawn[0]) == pytest.approx((row, column), abs=0.6)


def test_hidden_particles_are_not_drawn_and_faint_ones_are_faint():
    position = at(0, 0)
    hidden = figures.draw_particles(black(1), position, transparency=np.array([[0.05]]))
    faint = figures.draw_particles(black(1), position, transparency=np.array([[0.4]]))
    full = figures.draw_particles(black(1), position, transparency=np.array([[1.0]]))
    assert hidden.sum() == 0
    assert 0 < faint.sum() < full.sum()


def test_ring_has_the_size_of_the_scale():
    small, large = (
        figures.draw_particles(black(1, 32), at(0, 0), scale=np.full((1, 1, 2), share))[0] for share in (0.25, 0.5)
    )
    rows = [np.nonzero(p.sum(axis=(1, 2)))[0] for p in (small, large)]
    assert np.ptp(rows[0]) == pytest.approx(0.25 * 128, abs=2)
    assert np.ptp(rows[1]) == pytest.approx(0.5 * 128, abs=2)


def test_positions_outside_or_not_finite_are_harmless():
    position = np.array([[[5.0, 0.0], [np.nan, 0.0]]])
    assert figures.draw_particles(black(1), position).sum() == 0


def test_true_positions_are_drawn_only_where_present():
    truth = at(0, 0, t=2)
    drawn = figures.draw_particles(black(2), truth=truth, present=np.array([[True], [False]]))
    assert drawn[0].max() == 255
    assert drawn[1].sum() == 0


def test_frames_are_not_modified():
    frames = black(1)
    figures.draw_particles(frames, at(0, 0))
    assert frames.sum() == 0


def test_mask_overlay_tints_objects_and_leaves_the_background():
    masks = np.zeros((1, 2, 4, 4))
    masks[0, 0], masks[0, 1, :2] = 0.5, 0.9
    picture = figures.mask_overlay(np.full((1, 4, 4, 3), 100, np.uint8), masks, opacity=0.5)
    np.testing.assert_array_equal(picture[0, 3, 0], [100, 100, 100])
    np.testing.assert_array_equal(picture[0, 0, 0], np.round(50 + figures.colours(1)[0] / 2))


def test_component_grid_wraps_into_lines():
    masks, components = np.ones((5, 8, 8)), np.zeros((5, 8, 8, 3), np.uint8)
    one = figures.component_grid(masks, components, columns=5)
    two = figures.component_grid(masks, components, columns=3)
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] < one.shape[1]
    assert one.dtype == np.uint8


def test_strip_holds_every_frame_of_every_row():
    rows = {"truth": np.full((3, 8, 8, 3), 10, np.uint8), "prediction": np.full((3, 8, 8, 1), 20, np.uint8)}
    with pytest.raises(ValueError, match="rows of one shape"):
        figures.strip({"a": rows["truth"], "b": rows["truth"][:2]}, ["0", "1", "2"])
    picture = figures.strip(rows, ["0", "1", "2"], first_predicted=2, factor=2)
    assert (picture == 10).all(axis=-1).sum() == 3 * 16 * 16
    assert (picture == 20).all(axis=-1).sum() == 3 * 16 * 16


@pytest.mark.parametrize("encoding", ["webp", "gif", "png"])
def test_animation_has_every_frame_and_the_same_bytes_each_time(encoding):
    frames = np.stack([np.full((16, 16, 3), 60 * t, np.uint8) for t in range(4)])
    data = figures.animation({"truth": frames, "model": frames}, captions=list("abcd"), encoding=encoding)
    again = figures.animation({"truth": frames, "model": frames}, captions=list("abcd"), encoding=encoding)
    assert data == again
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 4
        assert image.width > 32


def test_animation_refuses_panels_of_different_length():
    with pytest.raises(ValueError, match="one length"):
        figures.animation({"a": black(2), "b": black(3)})


def test_png_and_webp_open_again():
    picture = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(figures.png(picture))) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    with Image.open(io.BytesIO(figures.webp(picture))) as image:
        assert image.size == (12, 10)


def test_line_plot_is_wellformed_escaped_and_leaves_gaps():
    svg = figures.line_plot(
        {"<b>": ([1, 2, 3, 4], [1.0, None, float("nan"), 2.0]), "other": ([1, 4], [0.5, 3.0])},
        x_label="step",
        y_label="a & b",
        mark_x=2,
    )
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert len(root.findall("polyline")) == 3
    assert "<b>" not in svg
    assert root.attrib["aria-label"] == "a & b"


def test_line_plot_on_a_log_axis_places_decades_evenly():
    svg = figures.line_plot({"x": ([0, 1, 2], [1.0, 10.0, 100.0])}, x_label="", y_label="", log_y=True)
    line = ElementTree.fromstring(svg).find("polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_line_plot_of_constant_or_no_values_still_draws():
    assert "polyline" in figures.line_plot({"x": ([3], [5.0])}, x_label="", y_label="")
    assert "No values" in figures.line_plot({"x": ([1], [None])}, x_label="", y_label="loss")


def test_line_plot_says_its_label_and_else_its_unit():
    assert 'aria-label="loss &amp; co"' in figures.line_plot(
        {"x": ([1], [2])}, x_label="step", y_label="nats", label="loss & co"
    )
    assert "No values of loss" in figures.line_plot({"x": ([1], [None])}, x_label="", y_label="", label="loss")


def test_histogram_has_a_bar_per_bin_as_high_as_its_share_and_is_escaped():
    svg = figures.histogram([1, 0, 4], 0.0, 3.0, x_label="<b>", unit="a & b", label='"quoted"')
    root = ElementTree.fromstring(svg)
    heights = [float(bar.attrib["height"]) for bar in root.findall("rect")]
    assert heights[1] == 0
    assert heights[0] * 4 == pytest.approx(heights[2], abs=0.3)
    titles = [bar.findtext("title") for bar in root.findall("rect")]
    assert titles[2] == "4 a & b from 2 to 3"
    assert root.attrib["aria-label"] == '"quoted"'


def test_histogram_of_one_value_is_one_bar_at_that_value():
    root = ElementTree.fromstring(figures.histogram([5], 0.25, 0.25, x_label="x"))
    assert len(root.findall("rect")) == 1
    assert [text.text for text in root.iter("text")].count("0.25") == 1


def test_what_is_not_a_number_is_not_drawn():
    nowhere = figures.draw_particles(black(1), at(0, 0), transparency=np.array([[np.nan]]), scale=np.full((1, 1, 2), 1))
    assert nowhere.sum() == 0
    grid = figures.component_grid(np.full((1, 4, 4), np.nan), np.zeros((1, 4, 4, 3), np.uint8))
    assert grid.dtype == np.uint8


def test_latent_walk_has_a_row_per_dimension_and_a_column_per_value():
    levels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 20 + 10
    frames = np.broadcast_to(levels, (2, 3, 8, 8, 3)).copy()
    picture = figures.latent_walk(frames, [-2.5, 0.0, 2.5], ["slot 0, 3", "slot 0, 4"], factor=2)
    centres = [np.argwhere((picture == level).all(axis=-1)).mean(axis=0) for level in levels.ravel()]
    rows, columns = np.array(centres).reshape(2, 3, 2)[..., 0], np.array(centres).reshape(2, 3, 2)[..., 1]
    assert (np.diff(rows, axis=0) >= 16).all()
    assert (np.diff(columns, axis=1) >= 16).all()
    assert np.ptp(rows, axis=1).max() == np.ptp(columns, axis=0).max() == 0


def test_latent_walk_refuses_frames_without_a_name_or_value_and_names_twice():
    frames = np.zeros((2, 3, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="2 names and 2 values"):
        figures.latent_walk(frames, [0.0, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match="names that differ"):
        figures.latent_walk(frames, [-1.0, 0.0, 1.0], ["a", "a"])
