import io
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

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


def test_trails_lead_from_the_past_to_the_present_of_visible_particles():
    position = np.stack([np.linspace([-0.5, -0.5], [-0.5, 0.5], 5), np.tile([[0.5, 0.0]], (5, 1))], axis=1)
    transparency = np.tile([[1.0, 0.0]], (5, 1))
    drawn = figures.draw_trails(black(5, 32), position, transparency=transparency, length=2)
    columns = [np.nonzero(picture.sum(axis=(0, 2)))[0] for picture in drawn]
    assert drawn.shape == (5, 128, 128, 3)
    for t, first in ((0, 0), (1, 0), (4, 2)):
        ends = [((position[i, 0, 1] + 1) / 2 * 31 + 0.5) * 4 for i in (first, t)]
        assert columns[t][0] == pytest.approx(ends[0], abs=5)
        assert columns[t][-1] == pytest.approx(ends[1], abs=5)
    assert drawn[:, 64:].sum() == 0  # the other one is not visible


def test_highlighted_trails_are_broader_and_have_a_white_rim():
    position = np.linspace([0, -0.5], [0, 0.5], 5)[:, None]
    thin, broad = (
        figures.draw_trails(black(5, 32), position, highlighted=np.array([chosen]))[-1] for chosen in (False, True)
    )
    middle = thin.shape[1] // 2
    assert (broad[:, middle].sum(axis=-1) > 0).sum() > (thin[:, middle].sum(axis=-1) > 0).sum()
    assert (broad[:, middle] >= 250).all(axis=-1).any()
    assert not (thin[:, middle] >= 250).all(axis=-1).any()


def test_a_film_has_the_same_bytes_whatever_was_in_its_memory_before():
    pytest.importorskip("av")
    chance = np.random.default_rng(0)
    blocks = (chance.random((7, 24, 70, 3)) * 255).astype(np.uint8)
    pictures = blocks.repeat(13, axis=1).repeat(15, axis=2)[:, :290, :1030]
    before, films = [], set()
    for _ in range(15):
        before = [*before[-8:], np.full(chance.integers(1, 3_000_000), chance.integers(255), np.uint8)]
        films.add(figures.mp4(pictures))
    assert len(films) == 1


def test_a_film_has_every_picture_and_the_same_bytes_each_time():
    av = pytest.importorskip("av")
    pictures = np.stack([np.full((17, 33, 3), 60 * t, np.uint8) for t in range(4)])
    data = figures.mp4(pictures, fps=5)
    assert data == figures.mp4(pictures, fps=5)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 5
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert shown.shape == (4, 18, 34, 3)
    assert abs(shown[:, 4:12, 4:28].astype(int) - pictures[:, 4:12, 4:28]).max() <= 6
    with pytest.raises(ValueError, match="a film needs pictures"):
        figures.mp4(pictures[:0])


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


def test_line_plot_draws_the_first_and_the_named_curves_boldly():
    svg = figures.line_plot({n: ([1, 2], [1.0, 2.0]) for n in "abc"}, x_label="", y_label="", bold=["c"])
    widths = {
        line.attrib["stroke"]: float(line.attrib["stroke-width"])
        for line in ElementTree.fromstring(svg).iter("polyline")
    }
    first, second, third = (widths[colour] for colour in figures.CURVES[:3])
    assert first == third > second


def dots(svg: str) -> dict[str | None, tuple[float, float]]:
    circles = ElementTree.fromstring(svg).findall("circle")
    return {c.findtext("title"): (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles}


def test_scatter_plot_places_dots_bars_and_line_on_the_same_axes():
    points = [
        figures.Point(0, 1.0, "a"),
        figures.Point(1, 3.0, "b", bold=True, low=2.0, high=4.0),
        figures.Point(2, 2.0, "c"),
    ]
    svg = figures.scatter_plot(points, x_label="x", y_label="y", line=[(0, 1.0), (2, 2.0)], line_label="front")
    at = dots(svg)
    assert list(at) == ["a", "c", "b"], "bold ones on top"
    assert at["b"][0] - at["a"][0] == pytest.approx(at["c"][0] - at["b"][0], abs=0.11)
    assert at["a"][1] - at["c"][1] == pytest.approx(at["c"][1] - at["b"][1], abs=0.11)
    root = ElementTree.fromstring(svg)
    (line,) = root.findall("polyline")
    assert line.attrib["points"] == "{:.1f},{:.1f} {:.1f},{:.1f}".format(*at["a"], *at["c"])
    (bar,) = root.findall("line")
    assert float(bar.attrib["x1"]) == float(bar.attrib["x2"]) == at["b"][0]
    assert float(bar.attrib["y1"]) == pytest.approx(at["c"][1], abs=0.11), "2 is where c is"
    assert float(bar.attrib["y1"]) - at["b"][1] == pytest.approx(at["b"][1] - float(bar.attrib["y2"]), abs=0.11)
    assert "front" in [text.text for text in root.iter("text")]


def test_scatter_plot_on_log_axes_places_decades_evenly_and_leaves_out_what_has_no_logarithm():
    points = [figures.Point(10.0**i, 10.0**-i, str(i)) for i in range(3)]
    points += [figures.Point(0.0, 1.0, "zero"), figures.Point(1.0, -1.0, "below"), figures.Point(1.0, None, "none")]
    points += [figures.Point(float("nan"), 1.0, "nan"), figures.Point(1.0, float("inf"), "infinite")]
    at = dots(figures.scatter_plot(points, x_label="x", y_label="y", log_x=True, log_y=True))
    assert list(at) == ["0", "1", "2"]
    for axis in (0, 1):
        assert at["1"][axis] - at["0"][axis] == pytest.approx(at["2"][axis] - at["1"][axis], abs=0.11)


def test_scatter_plot_of_categories_has_them_at_equal_distances_in_the_given_order():
    names = ["b", "a", "<c> which is too long for its place in this narrow plot"]
    points = [figures.Point(name, i, name) for i, name in enumerate(names)]
    svg = figures.scatter_plot(points, x_label="x", y_label="y", categories=names, size=(200, 200))
    at = dots(svg)
    apart = [at["a"][0] - at["b"][0], at[names[2]][0] - at["a"][0]]
    assert apart == pytest.approx([136 / 3, 136 / 3], abs=0.11), "a third of what the margins leave"
    texts = [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]
    assert texts.index("b") < texts.index("a")
    assert "\u2026 plot" in texts
    assert "<c>" not in svg


@pytest.mark.parametrize(("x", "categories"), [("d", ["a"]), ("a", None), (1, ["a"])])
def test_scatter_plot_refuses_what_has_no_place(x: int | str, categories: list[str] | None):
    with pytest.raises(ValueError, match=f"x={x!r} has no place"):
        figures.scatter_plot([figures.Point(x, 1)], x_label="", y_label="", categories=categories)


def test_scatter_plot_of_one_or_no_dots_still_draws_and_is_escaped():
    svg = figures.scatter_plot([figures.Point(5, 5, "<b>")], x_label="<i>", y_label='"a" & b', line_label="<u>")
    assert list(dots(svg)) == ["<b>"]
    assert not {"b", "i", "u"} & {each.tag for each in ElementTree.fromstring(svg).iter()}
    assert ElementTree.fromstring(svg).attrib["aria-label"] == '"a" & b'
    assert "No values of loss" in figures.scatter_plot([], x_label="", y_label="loss")


def test_bar_plot_has_bars_as_long_as_their_values():
    svg = figures.bar_plot({"model.<k>": 0.75, "none": None, "lr": 0.25, "nothing": 0.0}, x_label="share & more")
    root = ElementTree.fromstring(svg)
    bars = {bar.findtext("title"): float(bar.attrib["width"]) for bar in root.iter("rect")}
    assert list(bars) == ["model.<k>: 0.75", "lr: 0.25", "nothing: 0"]
    assert bars["lr: 0.25"] * 3 == pytest.approx(bars["model.<k>: 0.75"], abs=0.2)
    assert bars["nothing: 0"] == 0
    assert [text.text for text in root.iter("text")].count("0.75") == 1
    assert root.attrib["aria-label"] == "share & more"
    assert "<k>" not in svg


def test_bar_plot_keeps_the_end_of_a_long_name_and_says_when_there_is_none():
    svg = figures.bar_plot({"model." + 60 * "x" + ".kl_weight": 1}, x_label="share", width=200)
    (name, *_) = [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]
    assert name.startswith("\u2026x")
    assert name.endswith(".kl_weight")
    assert "No values of share" in figures.bar_plot({"a": float("nan")}, x_label="share")
    with pytest.raises(ValueError, match=r"bars begin at 0, got \{'a': -1\.0\}"):
        figures.bar_plot({"a": -1}, x_label="share")


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


def test_an_overlay_has_every_frame_and_the_last_one_brightest():
    frames = np.zeros((3, 4, 4, 1), np.uint8)
    frames[0, 0, 0] = frames[1, 1, 1] = frames[2, 2, 2] = 200
    frames[0, 3, 3] = frames[2, 3, 3] = 200
    picture = figures.overlay(frames, faintest=0.5)
    assert picture.shape == (4, 4, 3)
    assert picture[[0, 1, 2, 3], [0, 1, 2, 3], 0].tolist() == [100, 150, 200, 200]
    assert picture.sum() == 3 * 650
    np.testing.assert_array_equal(figures.overlay(frames[1:2]), np.repeat(frames[1], 3, axis=-1))


def test_an_overlay_keeps_colours_and_its_frames():
    frames = np.zeros((2, 2, 2, 3), np.uint8)
    frames[0, 0, 0], frames[1, 0, 0] = (200, 0, 0), (0, 0, 100)
    assert figures.overlay(frames, faintest=0.25)[0, 0].tolist() == [50, 0, 100]
    assert frames[0, 0, 0, 0] == 200


@pytest.mark.parametrize(("shape", "faintest"), [((0, 4, 4, 1), 0.5), ((4, 4, 1), 0.5), ((2, 4, 4, 1), 1.5)])
def test_an_overlay_of_nothing_is_refused(shape, faintest):
    with pytest.raises(ValueError, match=r"needs frames \(t, h, w, c\) and a weight in \[0, 1\]"):
        figures.overlay(np.zeros(shape, np.uint8), faintest=faintest)


def test_overlays_stand_side_by_side_though_one_is_shorter():
    panels = {"generated": np.full((2, 8, 8, 1), 10, np.uint8), "true": np.full((3, 8, 8, 3), 20, np.uint8)}
    picture = figures.overlays(panels, factor=3)
    assert (picture == 10).all(axis=-1).sum() == (picture == 20).all(axis=-1).sum() == 24 * 24
    with pytest.raises(ValueError, match="one height"):
        figures.overlays({"a": black(2), "b": black(2, 9)})
    with pytest.raises(ValueError, match="at least one panel"):
        figures.overlays({})


def tracks(n: int = 4, k: int = 2) -> np.ndarray:
    """Objects that go right, one above the other."""
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, k), np.linspace(-0.8, 0.8, n))
    return np.stack([y, x], axis=-1)


def lines(svg: str, name: str) -> list[list[tuple[float, float]]]:
    """The (x, y) on the page of every line of the track with this name."""
    found = [group for group in ElementTree.fromstring(svg).iter("g") if group.findtext("title") == name]
    points = [line.attrib["points"].split() for group in found for line in group.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in points]


def groups(svg: str) -> dict[str, Element]:
    return {g.findtext("title", ""): g for g in ElementTree.fromstring(svg).iter("g") if g.find("title") is not None}


def test_every_object_has_a_line_of_each_kind_in_its_colour():
    kinds = {"true": tracks(), "inferred": tracks() + 0.1, "generated": tracks()[2:], "interpolated": tracks()}
    svg = figures.track_plot(kinds)
    found = groups(svg)
    assert list(found) == [f"{kind}, object {k}" for kind in kinds for k in range(2)]
    for k, colour in enumerate(figures.colours(2)):
        ink = {found[f"{kind}, object {k}"][1].attrib["stroke"] for kind in kinds if kind != "true"}
        assert ink == {"#{:02x}{:02x}{:02x}".format(*colour)}
        assert found[f"true, object {k}"][1].attrib["stroke"] not in ink, "the truth is pale"
    dashes = [found[f"{kind}, object 0"][1].attrib["stroke-dasharray"] for kind in kinds]
    assert len(set(dashes[1:])) == 3
    assert len(found["inferred, object 0"].findall("circle")) == 4 + 1
    assert svg == figures.track_plot(kinds)


def test_tracks_lie_in_the_frame_with_y_down_and_one_scale():
    corners = np.array([[[-1.0, -1.0]], [[-1.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    svg = figures.track_plot({"true": corners})
    (first, second, third, middle) = lines(svg, "true, object 0")[0]
    assert first[0] < second[0]
    assert first[1] == second[1] < third[1]
    assert second[0] - first[0] == pytest.approx(third[1] - second[1], abs=0.11)
    assert middle == pytest.approx(((first[0] + third[0]) / 2, (first[1] + third[1]) / 2), abs=0.11)
    frame = next(iter(ElementTree.fromstring(svg).iter("rect")))
    assert (float(frame.attrib["x"]), float(frame.attrib["y"])) == first


def test_a_ring_is_where_a_track_begins_and_gaps_are_left():
    track = tracks(7, 1)
    track[[0, 3], 0] = np.nan
    svg = figures.track_plot({"generated": track}, styles={"generated": 2})
    assert [len(line) for line in lines(svg, "generated, object 0")] == [2, 3]
    (ring,) = groups(svg)["generated, object 0"].findall("circle")
    assert (float(ring.attrib["cx"]), float(ring.attrib["cy"])) == lines(svg, "generated, object 0")[0][0]


def test_a_track_that_leaves_is_cut_and_the_frame_stays_visible():
    far = tracks(3, 1)
    far[2] = 1e200
    svg = figures.track_plot({"generated": far}, size=300)
    frame = next(iter(ElementTree.fromstring(svg).iter("rect")))
    assert float(frame.attrib["width"]) > 300 / 2
    assert max(lines(svg, "generated, object 0")[0])[0] == 1e6, "beyond the inner svg, which cuts it"


def test_latents_of_any_size_fill_the_plot_without_a_frame():
    latents = 500 + 40 * tracks()
    svg = figures.track_plot({"inferred": latents}, frame=False, size=300)
    assert not list(ElementTree.fromstring(svg).iter("rect"))
    across = [x for k in range(2) for x, _ in lines(svg, f"inferred, object {k}")[0]]
    assert max(across) - min(across) == pytest.approx(298 / 1.08, abs=0.2)
    still = figures.track_plot({"inferred": np.full((3, 1, 2), 7.0)}, frame=False, size=300)
    assert lines(still, "inferred, object 0")[0][0] == (149, 149)


def test_clips_share_a_plot_with_colours_by_object():
    batch = np.stack([tracks(), tracks() + 0.3, tracks() - 0.3])
    svg = figures.track_plot({"inferred": batch})
    assert len(lines(svg, "inferred, object 1")) == 3
    assert len(groups(svg)) == 2


def test_tracks_are_escaped_and_told_and_nothing_to_draw_is_said():
    svg = figures.track_plot({"<b>": tracks()}, label='clip "1"')
    assert "<b>" not in svg
    assert ElementTree.fromstring(svg).attrib["aria-label"] == 'clip "1"'
    assert "No values of tracks" in figures.track_plot({"true": np.full((3, 1, 2), np.nan)})
    assert "No values" in figures.track_plot({})
    with pytest.raises(ValueError, match=r"\(t, k, 2\) or \(n, t, k, 2\), got \{'true': \(3, 2\)\}"):
        figures.track_plot({"true": np.zeros((3, 2))})
