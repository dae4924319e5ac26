"""Pictures of videos, particles, masks and curves, returned as arrays, bytes or text; nothing here writes a file.

``frames`` are uint8 (t, h, w, c) with one or three channels, pictures uint8 (H, W, 3). Positions are (y, x) in [-1, 1]
with ``align_corners=True``: -1 is the centre of the first pixel, 1 the centre of the last. Object k has the colour
``colours(n)[k]`` in every picture, so that identity is visible over time.
"""

import colorsys
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from av.video.stream import VideoStream

Colour = tuple[int, int, int]
Series = Mapping[str, tuple[Sequence[int | float], Sequence[int | float | None]]]

INK: Colour = (31, 41, 51)
MUTED: Colour = (123, 135, 148)
PAPER: Colour = (255, 255, 255)
CONTEXT: Colour = (59, 130, 246)
PREDICTED: Colour = (22, 163, 74)
PALETTE: tuple[Colour, ...] = (
    (255, 127, 14),
    (44, 160, 44),
    (227, 26, 28),
    (148, 103, 189),
    (23, 190, 207),
    (240, 228, 66),
    (247, 104, 161),
    (31, 120, 230),
    (166, 216, 84),
    (177, 89, 40),
)
CURVES = ("#2563eb", "#d97706", "#6b7280", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207")
CHARACTER = 6.6
"""Width of a letter of 12 units, about."""
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2")
TRACES = ((6.0, ""), (1.4, ""), (1.8, "6 3"), (2.0, "1.5 3"))
"""Width and dashes of the lines of a track: pale for the first, with a dot at each frame for the second."""
REACH = 2.0
"""Tracks that leave the frame are shown up to this coordinate."""
OVERSAMPLE = 2


class Point(NamedTuple):
    """A dot of ``scatter_plot``."""

    x: int | float | str
    """A number, or one of the plot's categories."""
    y: int | float | None
    title: str = ""
    """What it says when it is pointed at."""
    bold: bool = False
    low: int | float | None = None
    """Lower end of a vertical bar through the dot."""
    high: int | float | None = None
    """Upper end of that bar; both ends or neither."""


def colours(count: int) -> np.ndarray:
    """The fixed colour of each of ``count`` objects, uint8 (count, 3); the first ones do not depend on ``count``."""
    extra = [
        tuple(round(255 * v) for v in colorsys.hls_to_rgb((k * 0.618034) % 1, 0.45 + 0.2 * (k % 2), 0.75))
        for k in range(len(PALETTE), count)
    ]
    return np.array([*PALETTE[:count], *extra], dtype=np.uint8).reshape(count, 3)


def upscale(frames: np.ndarray, factor: int = 4) -> np.ndarray:
    """Enlarge frames (..., h, w, c) by a whole factor with nearest neighbour; one channel becomes three."""
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if frames.shape[-1] == 1:
        frames = np.repeat(frames, 3, axis=-1)
    return np.repeat(np.repeat(frames, factor, axis=-3), factor, axis=-2)


def draw_particles(
    frames: np.ndarray,
    position: np.ndarray | None = None,
    *,
    transparency: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    present: np.ndarray | None = None,
    factor: int = 4,
    threshold: float = 0.1,
) -> np.ndarray:
    """Enlarge frames and draw particles as coloured dots with a ring, true positions as white crosses.

    Args:
        frames: uint8 (t, h, w, c).
        position: (t, k, 2), (y, x) in [-1, 1]; may leave the frame.
        transparency: (t, k) in [0, 1], 1 fully visible: the opacity of dot and ring.
        scale: (t, k, 2), (height, width) of the particle's patch as a share of the frame, in [0, 1]: the ring.
        truth: (t, n, 2), true positions.
        present: bool (t, n), which true positions exist.
        factor: enlargement.
        threshold: least transparency that is drawn.

    Returns:
        uint8 (t, h * factor, w * factor, 3).
    """
    canvas = upscale(frames, factor)
    return np.stack(
        [
            _annotate(
                canvas[t],
                None if position is None else position[t],
                None if transparency is None else transparency[t],
                None if scale is None else scale[t],
                None if truth is None else truth[t],
                None if present is None else present[t],
                factor,
                threshold,
            )
            for t in range(len(canvas))
        ]
    )


def draw_trails(
    frames: np.ndarray,
    position: np.ndarray,
    *,
    transparency: np.ndarray | None = None,
    highlighted: np.ndarray | None = None,
    length: int = 12,
    factor: int = 4,
    threshold: float = 0.1,
) -> np.ndarray:
    """Enlarge frames and draw where each visible particle is and has been.

    Args:
        frames: uint8 (t, h, w, c).
        position: (t, k, 2), (y, x) in [-1, 1].
        transparency: (t, k); a particle below ``threshold`` is not drawn, nor is its way in such frames.
        highlighted: bool (k,), particles whose way is drawn broadly, with a white rim and a ring; the others are thin.
        length: past frames that a way reaches back.
        factor: enlargement.
        threshold: least transparency that is drawn.

    Returns:
        uint8 (t, h * factor, w * factor, 3).
    """
    canvas = upscale(frames, factor)
    t, k = position.shape[:2]
    height, width = canvas.shape[1:3]
    over = OVERSAMPLE
    visible = np.all(np.isfinite(position) & (np.abs(np.nan_to_num(position)) <= REACH), axis=-1)
    if transparency is not None:
        visible = np.logical_and(visible, transparency >= threshold)
    chosen = np.zeros(k, bool) if highlighted is None else highlighted
    pixels = np.array([height, width]) / factor
    points = ((np.nan_to_num(position) + 1) / 2 * (pixels - 1) + 0.5) * factor * over
    palette = [_rgb(colour) for colour in colours(k)]
    unit = max(1.0, height / 256) * over
    pictures = []
    for now in range(t):
        layer = Image.new("RGBA", (width * over, height * over))
        draw = ImageDraw.Draw(layer)
        first = max(0, now - length)
        for n in sorted(range(k), key=lambda n: bool(chosen[n])):  # highlighted ones on top
            if not visible[now, n]:
                continue
            wide = (3.0 if chosen[n] else 1.5) * unit
            for colour, extra in (((255, 255, 255), 2.0), (palette[n], 0.0)) if chosen[n] else ((palette[n], 0.0),):
                for i in range(first, now):
                    if visible[i, n] and visible[i + 1, n]:
                        (y0, x0), (y1, x1) = points[i, n], points[i + 1, n]
                        draw.line([x0, y0, x1, y1], fill=(*colour, 255), width=round(wide + extra * unit))
            y, x = points[now, n]
            for colour, radius in (((0, 0, 0), 1.6), ((255, 255, 255), 1.3), (palette[n], 1.0)):
                r = radius * (4.0 if chosen[n] else 2.5) * unit
                draw.ellipse([x - r, y - r, x + r, y + r], fill=(*colour, 255))
        layer = layer.resize((width, height), Image.Resampling.BOX)
        picture = Image.fromarray(canvas[now]).convert("RGBA")
        pictures.append(np.asarray(Image.alpha_composite(picture, layer).convert("RGB")))
    return np.stack(pictures)


def mask_overlay(frames: np.ndarray, masks: np.ndarray, opacity: float = 0.6, *, background: bool = True) -> np.ndarray:
    """Tint each pixel with the colour of the component that claims it; component 0, the background, stays untinted.

    Args:
        frames: uint8 (t, h, w, c).
        masks: (t, k, h, w), non-negative.
        opacity: of the tint.
        background: component 0 is the background; otherwise it is an object like the others.
    """
    if not background:
        masks = np.concatenate([np.full_like(masks[:, :1], -1), masks], axis=1)
    picture = upscale(frames, 1).astype(np.float32)
    owner = masks.argmax(axis=1)
    tint = np.concatenate([np.zeros((1, 3)), colours(masks.shape[1] - 1)])[owner]
    weight = opacity * (owner > 0)[..., None]
    return np.round(picture * (1 - weight) + tint * weight).astype(np.uint8)


def component_grid(
    masks: np.ndarray, components: np.ndarray, *, factor: int = 2, columns: int = 12, background: bool = True
) -> np.ndarray:
    """Each component alone above its mask, framed in the object's colour; component 0 is the background.

    Args:
        masks: (k, h, w) in [0, 1].
        components: uint8 (k, h, w, c).
        factor: enlargement.
        columns: components per line.
        background: component 0 is the background; otherwise it is an object like the others.
    """
    frame_colours = [MUTED] * background + [_rgb(c) for c in colours(len(masks) - background)]
    grey = np.round(np.clip(np.nan_to_num(masks), 0, 1) * 255).astype(np.uint8)[..., None]
    cells = []
    for k, colour in enumerate(frame_colours):
        pair = np.concatenate([upscale(components[k], factor), upscale(grey[k], factor)], axis=0)
        caption = "background" if background and k == 0 else str(k - background)
        cells.append(_captioned(_framed(pair, colour, 2), caption))
    lines = [_row(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return _column(lines)


def strip(
    rows: Mapping[str, np.ndarray], captions: Sequence[str], *, first_predicted: int | None = None, factor: int = 1
) -> np.ndarray:
    """Lay videos out as labelled rows of frames, one column per time, for example truth, reconstruction, prediction.

    Args:
        rows: label -> uint8 (n, h, w, c), all of one size.
        captions: text above each of the n columns.
        first_predicted: column at which prediction begins; a line is drawn before it.
        factor: enlargement.
    """
    videos = [upscale(frames, factor) for frames in rows.values()]
    if not videos or any(v.shape != videos[0].shape for v in videos) or len(captions) != len(videos[0]):
        shapes = {label: frames.shape for label, frames in rows.items()}
        raise ValueError(f"a strip needs rows of one shape and a caption per column, got {shapes} and {len(captions)}")
    count, height, width, _ = videos[0].shape
    text = min(20, max(12, height // 7))
    font = _font(text)
    label_width = max(math.ceil(font.getlength(label)) for label in rows) + 10
    gap, top = 3, text + 8
    picture = Image.new("RGB", (label_width + count * (width + gap), top + len(videos) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        left = label_width + i * (width + gap)
        predicted = first_predicted is not None and i >= first_predicted
        draw.text((left + width / 2, top / 2), caption, PREDICTED if predicted else MUTED, _font(text - 1), anchor="mm")
        for j, video in enumerate(videos):
            picture.paste(Image.fromarray(video[i]), (left, top + j * (height + gap)))
    for j, label in enumerate(rows):
        draw.text((0, top + j * (height + gap) + height / 2), label, INK, font, anchor="lm")
    if first_predicted is not None and 0 < first_predicted < count:
        x = label_width + first_predicted * (width + gap) - 2
        draw.line([(x, 4), (x, picture.height)], PREDICTED, 2)
    return np.asarray(picture)


def latent_walk(frames: np.ndarray, values: Sequence[float], names: Sequence[str], *, factor: int = 1) -> np.ndarray:
    """What each latent dimension does: one row per dimension, one column per value that it is set to.

    Args:
        frames: uint8 (d, v, h, w, c), the decoded frame with dimension d at value v and the others kept.
        values: above each of the v columns.
        names: in front of each of the d rows; all different.
        factor: enlargement.
    """
    if frames.ndim != 5 or frames.shape[:2] != (len(names), len(values)) or 0 in frames.shape:
        raise ValueError(
            f"a latent walk needs frames (d, v, h, w, c) with a name per d and a value per v, got {frames.shape}, "
            f"{len(names)} names and {len(values)} values"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"a latent walk needs names that differ, got {list(names)}")
    return strip(dict(zip(names, frames, strict=True)), [f"{value:.3g}" for value in values], factor=factor)


def animation(
    panels: Mapping[str, np.ndarray],
    *,
    fps: float = 10.0,
    captions: Sequence[str] | None = None,
    borders: Mapping[str, Sequence[Colour]] | None = None,
    encoding: Literal["webp", "gif", "png"] = "webp",
) -> bytes:
    """Play videos side by side, endlessly.

    Args:
        panels: label -> uint8 (t, h, w, 3), all of one length and height.
        fps: frames per second.
        captions: a line of text below the panels for each frame.
        borders: label -> colour of that panel's border for each frame.
        encoding: ``webp`` (small), ``gif`` (understood everywhere, 256 colours) or ``png`` (animated, lossless, large).
    """
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    images = [Image.fromarray(picture) for picture in side_by_side(panels, captions=captions, borders=borders)]
    buffer = io.BytesIO()
    settings = {"webp": {"quality": 85, "method": 2}, "gif": {"disposal": 1}, "png": {}}[encoding]
    duration = max(20, round(1000 / fps))
    images[0].save(buffer, encoding, save_all=True, append_images=images[1:], duration=duration, loop=0, **settings)
    return buffer.getvalue()


def side_by_side(
    panels: Mapping[str, np.ndarray],
    *,
    captions: Sequence[str] | None = None,
    borders: Mapping[str, Sequence[Colour]] | None = None,
) -> np.ndarray:
    """The pictures of a film in which videos play side by side, uint8 (t, H, W, 3); arguments as of ``animation``."""
    lengths = {label: len(frames) for label, frames in panels.items()}
    if not panels or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"an animation needs panels of one length of at least one frame, got {lengths}")
    pictures = []
    for t in range(next(iter(lengths.values()))):
        cells = []
        for label, frames in panels.items():
            colour = borders[label][t] if borders and label in borders else MUTED
            cells.append(_captioned(_framed(upscale(frames[t], 1), colour, 3), label))
        picture = _row(cells)
        if captions is not None:
            picture = _column([picture, _text_line(captions[t], picture.shape[1])])
        pictures.append(picture)
    return np.stack(pictures)


def mp4(pictures: np.ndarray, *, fps: float = 10.0, crf: int = 18) -> bytes:
    """Encode pictures, uint8 (t, H, W, 3), as H.264 in MP4; the same pictures give the same bytes.

    Odd sides are padded by a white line, because the format halves the colours. Needs PyAV.

    Args:
        pictures: what to encode.
        fps: pictures per second.
        crf: x264's constant rate factor; lower is better quality and more bytes, 18 looks like the original.

    Raises:
        ValueError: no pictures, or ``fps`` is not positive.
    """
    import av

    if pictures.ndim != 4 or len(pictures) == 0 or fps <= 0:
        raise ValueError(f"a film needs pictures (t, H, W, 3) and a positive fps, got {pictures.shape} and {fps:g}")
    even = [(0, side % 2) for side in pictures.shape[1:3]]
    pictures = np.pad(pictures, [(0, 0), *even, (0, 0)], constant_values=PAPER[0])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        # x264's macroblock tree reads memory that nobody has written at the end of a film with B-frames.
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "mbtree": "0"}
        rate = Fraction(fps).limit_denominator(1000)
        stream = cast("VideoStream", container.add_stream("libx264", rate=rate, options=options))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def overlay(frames: np.ndarray, *, faintest: float = 0.25) -> np.ndarray:
    """All frames of a clip in one picture, later ones brighter: moving balls on black (Fig. 1 of Chiappa & Paquet).

    Each pixel has the largest value that it takes, with frame t weighted from ``faintest`` (the first) to 1 (the last).

    Args:
        frames: uint8 (t, h, w, c), bright things on black.
        faintest: weight of the first frame, in [0, 1]; a single frame is the last.

    Returns:
        uint8 (h, w, 3).
    """
    if frames.ndim != 4 or len(frames) == 0 or not 0 <= faintest <= 1:
        raise ValueError(
            f"an overlay needs frames (t, h, w, c) and a weight in [0, 1], got {frames.shape} and {faintest:g}"
        )
    weights = np.linspace(1, faintest, len(frames))[::-1]
    brightest = np.zeros(frames.shape[1:])
    for frame, weight in zip(frames, weights, strict=True):
        np.maximum(brightest, frame * weight, out=brightest)
    return upscale(np.round(brightest).astype(np.uint8), 1)


def overlays(panels: Mapping[str, np.ndarray], *, factor: int = 4, faintest: float = 0.25) -> np.ndarray:
    """Overlays side by side, for example of generated and of true frames (Figs. 6 and 9 of the same paper).

    Args:
        panels: label -> uint8 (t, h, w, c); lengths may differ, heights may not.
        factor: enlargement.
        faintest: see ``overlay``.
    """
    if not panels or len({frames.shape[1:2] for frames in panels.values()}) != 1:
        shapes = {label: frames.shape for label, frames in panels.items()}
        raise ValueError(f"overlays need at least one panel, and frames of one height, got {shapes}")
    cells = [
        _captioned(_framed(upscale(overlay(frames, faintest=faintest), factor), MUTED, 1), label)
        for label, frames in panels.items()
    ]
    return _row(cells)


def png(picture: np.ndarray) -> bytes:
    """Encode a picture, uint8 (H, W, 3), as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def webp(picture: np.ndarray, quality: int = 92) -> bytes:
    """Encode a picture, uint8 (H, W, 3), as lossy WebP: a tenth of a PNG for camera footage."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "webp", quality=quality, method=4)
    return buffer.getvalue()


def line_plot(
    series: Series,
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    mark_x: int | float | None = None,
    styles: Mapping[str, int] | None = None,
    bold: Collection[str] = (),
    size: tuple[int, int] = (460, 260),
    label: str = "",
) -> str:
    """Curves as an ``<svg>`` element to put into an HTML page; it takes the page's font and scales with its width.

    Args:
        series: name -> (x, y). ``None`` and non-finite y leave a gap.
        x_label: below the axis.
        y_label: above the axis.
        log_y: logarithmic axis; values that are not positive leave a gap.
        mark_x: a dashed vertical line there.
        styles: name -> number of its colour and dashes, for plots that share names; by order where not given. Number 0
            is drawn boldly.
        bold: names of further curves that are.
        size: width and height of the drawing in its own units.
        label: what a screen reader says; empty takes ``y_label``.
    """
    width, height = size
    style = {name: _curve_style((styles or {}).get(name, i), name in bold) for i, name in enumerate(series)}
    legend, legend_height = _legend(style, width)
    left, right, bottom = 46, width - 18, height - 40 + legend_height
    top = legend_height + (26 if y_label else 8)
    height += legend_height
    points = {name: _finite(x, y, log_y) for name, (x, y) in series.items()}
    flat = [point for run in points.values() for segment in run for point in segment]
    if not flat:
        return f'<p class="empty">No values of {escape(label or y_label)}.</p>'
    x_low, x_high = _range([p[0] for p in flat] + ([] if mark_x is None else [mark_x]), padding=0.0)
    y_low, y_high = _range([p[1] for p in flat], padding=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label or y_label)}">']
    parts.append(f'<g font-size="12" fill="#52606d">{legend}')
    rows = [(place(x_low, value)[1], text) for value, text in _labelled(y_low, y_high, 5, log_y)]
    columns = [(place(value, y_low)[0], text) for value, text in _labelled(x_low, x_high, 6, False)]
    parts.append(_axes(rows, columns, left, right, bottom))
    if mark_x is not None:
        x = place(float(mark_x), y_low)[0]
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"'
        parts.append(f'<line {ends} stroke="#9aa5b1" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="4" y="{top - 12}">{escape(y_label)}</text>')
    parts.append(f'<text x="{right}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text></g>')
    for name, segments in reversed(points.items()):
        colour, dash, stroke = style[name]
        shown = len(segments) > 0 and sum(len(s) for s in segments) <= 120
        for segment in segments:
            placed = [place(x, y) for x, y in segment]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{stroke}" '
                f'stroke-dasharray="{dash}" stroke-linejoin="round"/>'
            )
            for (x, y), (px, py) in zip(segment, placed, strict=True) if shown else ():
                label = f"{name}: {_number(10**y if log_y else y)} at {_number(x)}"
                radius = 2.4 if dash == "" or len(segment) == 1 else 1.4
                parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" fill="{colour}">')
                parts.append(f"<title>{escape(label)}</title></circle>")
    parts.append("</svg>")
    return "".join(parts)


def track_plot(
    tracks: Mapping[str, np.ndarray],
    *,
    styles: Mapping[str, int] | None = None,
    frame: bool = True,
    size: int = 320,
    label: str = "tracks of objects",
) -> str:
    """Tracks of objects in the plane as an ``<svg>`` element: true, inferred, generated, interpolated ones in one plot.

    Object k has the colour of index k in every kind of track, the kind shows in the line, and a ring is where a track
    begins (Figs. 3, 5, 8 and 9 of Chiappa & Paquet). Both axes have one scale and y goes down.

    Args:
        tracks: name -> (t, k, 2), or (n, t, k, 2) to draw n clips into one plot; positions (y, x). Lengths may differ,
            and positions that are not finite leave a gap, so a rollout may come alone or behind such a context.
        styles: name -> number of its line, for plots that share names; by order where not given. Number 0 is broad and
            pale, for what others are compared with; 1 has a dot at each frame; 2 is dashed and 3 dotted.
        frame: positions are coordinates in [-1, 1], the frame is drawn, and tracks are cut at ``REACH``. Otherwise they
            are latents of any size, and all of them are shown.
        size: width of the drawing in its own units.
        label: what a screen reader says.
    """
    runs = {name: track[None] if track.ndim == 3 else track for name, track in tracks.items()}
    if any(run.ndim != 4 or run.shape[3] != 2 for run in runs.values()):
        shapes = {name: track.shape for name, track in tracks.items()}
        raise ValueError(f"tracks must be (t, k, 2) or (n, t, k, 2), got {shapes}")
    style = {name: (styles or {}).get(name, i) % len(TRACES) for i, name in enumerate(runs)}
    points = np.concatenate([np.zeros((0, 2)), *(run.reshape(-1, 2) for run in runs.values())])
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return f'<p class="empty">No values of {escape(label)}.</p>'
    if frame:
        points = np.concatenate([np.clip(points, -REACH, REACH), [[-1, -1], [1, 1]]])
    low, high = points.min(axis=0), points.max(axis=0)
    middle, side = (low + high) / 2, size - 2
    scale = side / (1.08 * (float((high - low).max()) or 1.0))

    def place(point: np.ndarray) -> tuple[float, float]:
        y, x = np.clip((point - middle) * scale + side / 2, -1e6, 1e6)  # a diverged track stays a number of few digits
        return float(x), float(y)

    lines = {name: ("#cbd2d9" if s == 0 else "#52606d", TRACES[s][1], TRACES[s][0]) for name, s in style.items()}
    legend, top = _legend(lines, size)
    parts = [f'<svg class="plot" viewBox="0 0 {size} {top + size}" role="img" aria-label="{escape(label)}">']
    parts.append(f'<g font-size="12" fill="#52606d">{legend}</g>')
    # An inner svg cuts what leaves it.
    parts.append(f'<svg x="1" y="{top + 1}" width="{side}" height="{side}">')
    if frame:
        (x, y), (right, bottom) = place(np.array([-1.0, -1.0])), place(np.array([1.0, 1.0]))
        box = f'x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"'
        parts.append(f'<rect {box} fill="#f5f7fa" stroke="#9aa5b1"/>')
    for name in sorted(runs, key=lambda name: style[name] > 0):
        parts += [
            _track(track, f"{name}, object {k}", colour, style[name], place)
            for run in runs[name]
            for k, (track, colour) in enumerate(zip(run.swapaxes(0, 1), colours(run.shape[1]), strict=True))
        ]
    parts.append("</svg></svg>")
    return "".join(parts)


def histogram(
    counts: Sequence[int],
    low: int | float,
    high: int | float,
    *,
    x_label: str,
    unit: str = "",
    label: str = "",
    size: tuple[int, int] = (300, 120),
) -> str:
    """Counts of equal bins as an ``<svg>`` element of bars.

    Args:
        counts: of each bin.
        low: where the first bin begins.
        high: where the last bin ends; equal to ``low`` if all values are.
        x_label: below the axis.
        unit: what is counted.
        label: what a screen reader says; empty takes ``x_label``.
        size: width and height of the drawing in its own units.
    """
    width, height = size
    left, right, top, bottom = 4, width - 4, 16, height - 36
    most = max([1, *counts])
    bar = (right - left) / max(1, len(counts))
    inset = 0.35 if low == high else 0.0  # one value is one narrow bar
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label or x_label)}">']
    for i, count in enumerate(counts):
        tall = count / most * (bottom - top)
        x, wide = left + (i + inset) * bar, max(1.0, (1 - 2 * inset) * bar - 1)
        first, last = (low + (high - low) * j / len(counts) for j in (i, i + 1))
        parts.append(
            f'<rect x="{x:.1f}" y="{bottom - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{CURVES[0]}">'
            f"<title>{count} {escape(unit)} from {_number(first)} to {_number(last)}</title></rect>"
        )
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#9aa5b1"/>')
    ends = [((left + right) / 2, "middle", low)] if low == high else [(left, "start", low), (right, "end", high)]
    parts.append('<g font-size="12" fill="#52606d">')
    for x, anchor, value in ends:
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{_number(value)}</text>')
    parts.append(f'<text x="{left}" y="{top - 5}">{most} {escape(unit)}</text>')
    parts.append(f'<text x="{right}" y="{height - 5}" text-anchor="end">{escape(x_label)}</text></g></svg>')
    return "".join(parts)


def scatter_plot(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    categories: Sequence[str] | None = None,
    line: Sequence[tuple[int | float | str, int | float]] = (),
    line_label: str = "",
    size: tuple[int, int] = (460, 260),
    label: str = "",
) -> str:
    """Dots as an ``<svg>`` element, with a line through some places and a vertical bar through a dot if it has one.

    Args:
        points: later ones lie on top, bold ones on top of all. Those that are not finite, or not positive on a
            logarithmic axis, are left out.
        x_label: below the axis.
        y_label: above the axis.
        log_x: logarithmic axis; not with ``categories``.
        log_y: the same upwards.
        categories: texts at equal distances along x; every x is one of them. Numbers where not given.
        line: (x, y) of places that are joined, in this order.
        line_label: what the line is, for the legend.
        size: width and height of the drawing in its own units.
        label: what a screen reader says; empty takes ``y_label``.

    Raises:
        ValueError: an x that is no category, or a text where there are none.
    """
    width, height = size
    legend, legend_height = _legend({line_label: (CURVES[1], "", 1.6)}, width) if line and line_label else ("", 0)
    left, right, bottom = 46, width - 18, height - 40 + legend_height
    top = legend_height + (26 if y_label else 8)
    height += legend_height

    places = {category: float(i) for i, category in enumerate(categories or ())}
    for x in (*(point.x for point in points), *(x for x, _ in line)):
        if x not in places if isinstance(x, str) else categories is not None:
            raise ValueError(f"x={x!r} has no place: numbers go without categories, texts are one of {list(places)}")

    def along(x: int | float | str) -> float | None:
        return places[x] if isinstance(x, str) else _on_axis(x, log_x)

    across = [along(point.x) for point in points]
    up = [_on_axis(point.y, log_y) for point in points]
    placed = [(p, x, y) for p, x, y in zip(points, across, up, strict=True) if x is not None and y is not None]
    if not placed:
        return f'<p class="empty">No values of {escape(label or y_label)}.</p>'
    bars = [(_on_axis(p.low, log_y), _on_axis(p.high, log_y)) for p, _, _ in placed]
    joined = [(along(x), _on_axis(y, log_y)) for x, y in line]
    corners = [(x, y) for x, y in joined if x is not None and y is not None]
    x_values = [x for _, x, _ in placed] + [x for x, _ in corners]
    if categories is not None:
        x_low, x_high = -0.5, len(categories) - 0.5
    else:
        x_low, x_high = _range(x_values, padding=0.04)
    ends = [end for bar in bars if None not in bar for end in bar if end is not None]
    y_low, y_high = _range([y for _, _, y in placed] + [y for _, y in corners] + ends, padding=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        right_by, up_by = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + right_by * (right - left), bottom - up_by * (bottom - top)

    rows = [(place(x_low, value)[1], text) for value, text in _labelled(y_low, y_high, 5, log_y)]
    if categories is None:
        columns = [(place(value, y_low)[0], text) for value, text in _labelled(x_low, x_high, 6, log_x)]
    else:
        space = (right - left) / len(categories)
        columns = [(left + (i + 0.5) * space, escape(_shortened(c, space))) for i, c in enumerate(categories)]
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label or y_label)}">']
    parts.append(f'<g font-size="12" fill="#52606d">{legend}{_axes(rows, columns, left, right, bottom)}')
    parts.append(f'<text x="4" y="{top - 12}">{escape(y_label)}</text>')
    parts.append(f'<text x="{right}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text></g>')
    if corners:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*corner) for corner in corners))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{CURVES[1]}" stroke-width="1.6"/>')
    for (point, x, y), (low, high) in sorted(zip(placed, bars, strict=True), key=lambda item: item[0][0].bold):
        colour, radius = (CURVES[0], 4.4) if point.bold else ("#7b8794", 3.2)
        px, py = place(x, y)
        title = f"<title>{escape(point.title)}</title>"
        if low is not None and high is not None:
            reach = f'y1="{place(x, low)[1]:.1f}" y2="{place(x, high)[1]:.1f}"'
            parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" {reach} stroke="{colour}" stroke-width="2">{title}</line>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.85">{title}')
        parts.append("</circle>")
    parts.append("</svg>")
    return "".join(parts)


def bar_plot(values: Mapping[str, int | float | None], *, x_label: str, width: int = 460, label: str = "") -> str:
    """Horizontal bars as an ``<svg>`` element, one below the other, each with its name before and its value behind.

    Args:
        values: name -> value from 0 on; what is not finite has no bar.
        x_label: below the bars.
        width: of the drawing in its own units; the height follows from the number of bars.
        label: what a screen reader says; empty takes ``x_label``.

    Raises:
        ValueError: a value is negative.
    """
    known = {name: _on_axis(value, False) for name, value in values.items()}
    found = {name: value for name, value in known.items() if value is not None}
    if not found:
        return f'<p class="empty">No values of {escape(label or x_label)}.</p>'
    if min(found.values()) < 0:
        raise ValueError(f"bars begin at 0, got {found}; draw values of both signs with scatter_plot")
    row, number = 26, 48
    left = min(0.5 * width, CHARACTER * max(len(name) for name in found) + 14)
    right, bottom = width - number, row * len(found) + 6
    scale = (right - left) / (max(found.values()) or 1.0)
    parts = [f'<svg class="plot" viewBox="0 0 {width} {bottom + 24}" role="img" ']
    parts.append(f'aria-label="{escape(label or x_label)}"><g font-size="12" fill="#52606d">')
    for i, (name, value) in enumerate(found.items()):
        y, long, text = 6 + i * row, value * scale, _number(value)
        parts.append(
            f'<text x="{left - 7:.1f}" y="{y + 15}" text-anchor="end">{escape(_shortened(name, left - 7))}</text>'
            f'<rect x="{left:.1f}" y="{y + 2}" width="{long:.1f}" height="{row - 8}" fill="{CURVES[0]}">'
            f"<title>{escape(name)}: {text}</title></rect>"
            f'<text x="{left + long + 5:.1f}" y="{y + 15}">{text}</text>'
        )
    parts.append(f'<line x1="{left:.1f}" x2="{left:.1f}" y1="2" y2="{bottom}" stroke="#9aa5b1"/>')
    parts.append(f'<text x="{left:.1f}" y="{bottom + 16}">{escape(x_label)}</text></g></svg>')
    return "".join(parts)


def _annotate(
    canvas: np.ndarray,
    position: np.ndarray | None,
    transparency: np.ndarray | None,
    scale: np.ndarray | None,
    truth: np.ndarray | None,
    present: np.ndarray | None,
    factor: int,
    threshold: float,
) -> np.ndarray:
    height, width = canvas.shape[:2]
    over = OVERSAMPLE
    layer = Image.new("RGBA", (width * over, height * over))
    draw = ImageDraw.Draw(layer)
    stroke = max(1, round(factor * over * 0.45))

    def centre(point: np.ndarray) -> tuple[float, float]:
        y = ((point[0] + 1) / 2 * (height / factor - 1) + 0.5) * factor * over
        x = ((point[1] + 1) / 2 * (width / factor - 1) + 0.5) * factor * over
        return float(y), float(x)

    def disc(y: float, x: float, radius: float, fill: tuple[int, ...]) -> None:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)

    for n in range(0 if truth is None else len(truth)):
        assert truth is not None
        if (present is not None and not present[n]) or not np.isfinite(truth[n]).all():
            continue
        y, x = centre(truth[n])
        arm = max(3.0, factor * 1.8) * over
        for colour, wide in (((0, 0, 0, 255), stroke + 2 * over), ((255, 255, 255, 255), stroke)):
            for dy, dx in ((arm, arm), (arm, -arm)):
                draw.line([x - dx, y - dy, x + dx, y + dy], fill=colour, width=wide)
    for k, colour in enumerate(colours(0 if position is None else len(position))):
        assert position is not None
        opacity = 1.0 if transparency is None else float(np.clip(transparency[k], 0, 1))
        if not opacity >= threshold or not np.isfinite(position[k]).all():  # NaN is not drawn either
            continue
        alpha = round(255 * opacity)
        y, x = centre(position[k])
        if scale is not None and np.isfinite(scale[k]).all():
            ry, rx = (float(side) * over / 2 for side in np.clip(scale[k], 0, 2) * (height, width))
            if min(ry, rx) > stroke:
                draw.ellipse([x - rx, y - ry, x + rx, y + ry], outline=(*_rgb(colour), alpha), width=stroke)
        radius = max(2.0, factor * 0.9) * over
        # A light and a dark rim, so that the dot is seen on any ground.
        disc(y, x, radius + 1.5 * over, (0, 0, 0, alpha))
        disc(y, x, radius + 0.75 * over, (255, 255, 255, alpha))
        disc(y, x, radius, (*_rgb(colour), alpha))
    layer = layer.resize((width, height), Image.Resampling.BOX)
    picture = Image.fromarray(canvas).convert("RGBA")
    return np.asarray(Image.alpha_composite(picture, layer).convert("RGB"))


def _track(
    track: np.ndarray,
    name: str,
    colour: np.ndarray,
    style: int,
    place: Callable[[np.ndarray], tuple[float, float]],
) -> str:
    """The line of one object, (t, 2), with a ring where it begins."""
    pale = 0.6 if style == 0 else 0.0
    ink = "#" + "".join(f"{round(value + pale * (255 - value)):02x}" for value in _rgb(colour))
    width, dash = TRACES[style]
    there = np.isfinite(track).all(axis=1)
    placed = {int(t): place(track[t]) for t in np.flatnonzero(there)}
    if not placed:
        return ""
    line = (
        f'fill="none" stroke="{ink}" stroke-width="{width}" stroke-dasharray="{dash}" stroke-linejoin="round" '
        f'stroke-linecap="{"round" if style == 0 else "butt"}"'
    )
    parts = [f"<g><title>{escape(name)}</title>"]
    for run in np.split(np.arange(len(track)), np.flatnonzero(~there)):
        inside = [placed[int(t)] for t in run if t in placed]
        if inside:
            parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in inside)}" {line}/>')
    for t, (x, y) in placed.items() if style == 1 else ():
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.9" fill="{ink}">')
        parts.append(f"<title>{escape(name)}, frame {t}</title></circle>")
    x, y = next(iter(placed.values()))
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" stroke="{ink}" stroke-width="1.6"/></g>')
    return "".join(parts)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _rgb(colour: np.ndarray) -> Colour:
    red, green, blue = (int(v) for v in colour)
    return red, green, blue


def _framed(picture: np.ndarray, colour: Colour, width: int) -> np.ndarray:
    framed = np.empty((picture.shape[0] + 2 * width, picture.shape[1] + 2 * width, 3), dtype=np.uint8)
    framed[:] = colour
    framed[width:-width, width:-width] = picture
    return framed


def _text_line(text: str, width: int, colour: Colour = INK, size: int = 13) -> np.ndarray:
    line = Image.new("RGB", (width, size + 9), PAPER)
    ImageDraw.Draw(line).text((1, (size + 9) / 2), text, colour, _font(size), anchor="lm")
    return np.asarray(line)


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    return np.concatenate([_text_line(caption, picture.shape[1]), picture], axis=0)


def _row(pictures: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    space = np.full((pictures[0].shape[0], gap, 3), PAPER, dtype=np.uint8)
    cells = [cell for picture in pictures for cell in (picture, space)][:-1]
    return np.concatenate(cells, axis=1)


def _column(pictures: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    width = max(picture.shape[1] for picture in pictures)
    height = sum(picture.shape[0] + gap for picture in pictures) - gap
    page = np.full((height, width, 3), PAPER, dtype=np.uint8)
    y = 0
    for picture in pictures:
        page[y : y + picture.shape[0], : picture.shape[1]] = picture
        y += picture.shape[0] + gap
    return page


def _finite(x: Sequence[int | float], y: Sequence[int | float | None], log_y: bool) -> list[list[tuple[float, float]]]:
    segments: list[list[tuple[float, float]]] = [[]]
    for across, value in zip(x, y, strict=True):
        up = _on_axis(value, log_y)
        if up is None:
            segments.append([])
        else:
            segments[-1].append((float(across), up))
    return [segment for segment in segments if segment]


def _on_axis(value: int | float | None, log: bool) -> float | None:
    """Where a value lies on an axis, in its units or their powers of ten; None if nowhere."""
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return math.log10(value) if log else float(value)


def _range(values: Sequence[int | float], padding: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    if high == low:
        padding = 0.5
    return low - padding * spread, high + padding * spread


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    whole = [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) >= 2:
        return whole[:: max(1, len(whole) // 6)]
    fine = [e + math.log10(m) for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [tick for tick in fine if low <= tick <= high]
    return inside if len(inside) >= 2 else _ticks(low, high, 4)


def _labelled(low: float, high: float, count: int, log: bool) -> list[tuple[float, str]]:
    """Ticks of an axis with their texts."""
    ticks = _log_ticks(low, high) if log else _ticks(low, high, count)
    return [(tick, _number(10**tick if log else tick)) for tick in ticks]


def _axes(
    rows: Sequence[tuple[float, str]], columns: Sequence[tuple[float, str]], left: float, right: float, bottom: float
) -> str:
    """Grid lines at the heights of ``rows``, and the axis below with marks at ``columns``."""
    parts = []
    for y, text in rows:
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in columns:
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#9aa5b1"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#9aa5b1"/>')
    return "".join(parts)


def _shortened(text: str, width: float) -> str:
    """The end of a text that is too long for a width, with what was cut marked: dotted names differ at their end."""
    most = max(1, int(width / CHARACTER))
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]


def _number(value: int | float) -> str:
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def _curve_style(index: int, bold: bool) -> tuple[str, str, float]:
    dash = DASHES[index % len(DASHES)]
    return CURVES[index % len(CURVES)], dash, 2.4 if bold or index == 0 else 1.6


def _legend(style: Mapping[str, tuple[str, str, float]], width: int) -> tuple[str, int]:
    parts, x, y = [], 4.0, 12
    for name, (colour, dash, stroke) in style.items():
        length = 26 + CHARACTER * len(name) + 16
        if x > 4 and x + length > width:
            x, y = 4.0, y + 18
        parts.append(
            f'<line x1="{x:.1f}" x2="{x + 20:.1f}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" '
            f'stroke-width="{stroke}" stroke-dasharray="{dash}"/>'
            f'<text x="{x + 25:.1f}" y="{y}">{escape(name)}</text>'
        )
        x += length
    return "".join(parts), y + 10
