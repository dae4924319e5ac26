"""The section of a report on what ``trajectories.py`` measured: a table by number of objects, curves, tracks, overlays.

The figures are those of Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019): latent tracks of
many clips (Fig. 5a), tracks of one clip on the true ones (Figs. 3, 8, 9), frames laid over each other (Figs. 6, 9).
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from objdyn import figures
from pipeline.report import ReportClip, cell, plot, still

TRACK_STYLES = {"true": 0, "inferred": 1, "predicted": 2, "interpolated": 3, "k-means": 1}
COPY, VELOCITY = "copied last position", "constant velocity"


class Row(NamedTuple):
    """A number with what it is compared with, best in bold."""

    label: str
    unit: str
    style: str
    higher: bool | None
    """Whether more is better; None where neither is."""
    keys: Mapping[str, str]
    """Key of ``metrics.json`` by whose it is."""


def _recovery(kind: str) -> tuple[Row, ...]:
    return (
        Row("R² over both axes", "", ".3f", True, {"": f"{kind}position_r2"}),
        Row("R² along y", "", ".3f", True, {"": f"{kind}position_r2_y"}),
        Row("R² along x", "", ".3f", True, {"": f"{kind}position_r2_x"}),
        Row("root mean square error", "px", ".2f", False, {"": f"{kind}position_rmse_px"}),
    )


TABLE: tuple[tuple[str, tuple[Row, ...]], ...] = (
    ("Inferred positions, up to one affine map", _recovery("")),
    ("Inferred positions, up to one similarity", _recovery("similarity_")),
    (
        "Identity of slots",
        (
            Row("clips in which slots exchange objects", "%", ".1f", False, {"": "identity_swap_rate"}),
            Row("frames in which two slots follow one object", "%", ".1f", False, {"": "collapse_share"}),
        ),
    ),
    (
        "Predicted positions",
        (
            Row(
                "distance", "px", ".2f", False,
                {
                    "model": "predict_error_px",
                    COPY: "copy_last_predict_error_px",
                    VELOCITY: "constant_velocity_predict_error_px",
                },
            ),
            Row(
                "root mean square distance", "px", ".2f", False,
                {
                    "model": "predict_rmse_px",
                    COPY: "copy_last_predict_rmse_px",
                    VELOCITY: "constant_velocity_predict_rmse_px",
                },
            ),
            Row(
                "distance, objects apart, frames alone", "px", ".2f", False,
                {
                    "k-means of the model's frames": "predict_kmeans_px",
                    "the model's positions": "predict_apart_px",
                    COPY: "copy_last_predict_apart_px",
                    VELOCITY: "constant_velocity_predict_apart_px",
                },
            ),
            Row("the same of the true frames by k-means", "px", ".2f", None, {"": "true_frames_predict_kmeans_px"}),
            Row("frames with enough white pixels", "%", ".1f", True, {"": "predict_painted_share"}),
        ),
    ),
    (
        "Predicted frames",
        (
            Row(
                "negative log-likelihood per pixel", "nats", ".4f", False,
                {"model": "predict_nll_pixel", "share of white pixels": "constant_predict_nll_pixel"},
            ),
            Row(
                "negative log-likelihood per frame", "nats", ".2f", False,
                {"model": "predict_nll_frame", "share of white pixels": "constant_predict_nll_frame"},
            ),
            *(
                Row(
                    f"white pixels, {name}", "", ".3f", True,
                    {
                        "model": f"predict_white_{name.lower()}",
                        "copied last frame": f"copy_last_predict_white_{name.lower()}",
                    },
                )
                for name in ("precision", "recall", "F1")
            ),
            Row(
                "loss with a second sigmoid", "", ".4f", None,
                {
                    "model": "predict_bce_double_sigmoid",
                    "all black": "all_black_predict_bce_double_sigmoid",
                    "the true frames": "perfect_predict_bce_double_sigmoid",
                    "share of white pixels": "constant_predict_bce_double_sigmoid",
                },
            ),
        ),
    ),
    (
        "Interpolated positions, in the frames of the gap",
        (
            Row(
                "distance", "px", ".2f", False,
                {
                    "interpolated": "interpolate_error_px",
                    "predicted": "predict_gap_error_px",
                    "inferred, all frames seen": "encode_gap_error_px",
                },
            ),
            Row(
                "distance from the inferred", "px", ".2f", False,
                {"interpolated": "interpolate_to_encode_px", "predicted": "predict_to_encode_px"},
            ),
        ),
    ),
    (
        "Density of the inferred positions under the dynamics, log p(a) per object and frame",
        (
            Row("in latent units", "nats", ".2f", None, {"": "log_prior"}),
            Row("in pixels", "nats", ".2f", True, {"": "log_prior_px"}),
        ),
    ),
)  # fmt: skip


def trajectories(
    metrics: Mapping[str, Any], clips: Sequence[ReportClip], latent_tracks: Mapping[str, np.ndarray]
) -> str:
    """The whole section; figures only of what is given beside the metrics."""
    parts = [table(metrics), dynamics(metrics), curves(metrics), together(latent_tracks)]
    return "".join([*parts, *(clip_tracks(clip) for clip in clips if clip.tracks is not None)])


def table(metrics: Mapping[str, Any]) -> str:
    """Every number for all clips and for each number of objects; groups that are not known are a sentence below."""
    groups = {"all": metrics, **metrics["by_objects"]}
    reasons: dict[str, int] = {}
    rows, unknown = [], []
    for heading, measures in TABLE:
        keys = [key for row in measures for key in row.keys.values()]
        if all(group.get(key) is None for group in groups.values() for key in keys):
            why = metrics.get("reasons", {}).get(keys[0], "no reason was recorded")
            unknown.append(f"{heading}: not known, {why}.")
            continue
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(groups) + 1}">{escape(heading)}</th></tr>')
        for row in measures:
            rows += _rows(row, groups, reasons)
    heads = "".join(
        f'<th scope="col">{escape(name)}<br>{group["clips"]:,} clips</th>'
        for name, group in {"all": metrics, **_named(metrics["by_objects"])}.items()
    )
    footnotes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    listed = f'<ol class="reasons">{footnotes}</ol>' if footnotes else ""
    context, horizon = metrics.get("context", 0), metrics.get("horizon", 0)
    explained = [
        f"Positions up to a map are {metrics['map']['note']}." if metrics.get("map") else "",
        f"Predicted are frames {context + 1} to {context + horizon} after the {context} first." if horizon else "",
        "Distances are from true positions without noise, slots assigned to objects clip by clip; the baselines know "
        "where objects were drawn in the frames that were seen. Frames with overlapping objects are left out where "
        "the row says apart, and each of the others is assigned alone, as k-means finds no identity. Small numbers are "
        "95 % intervals from a bootstrap over clips.",
        *unknown,
    ]
    for paper in metrics.get("paper", {}).values():
        explained.append(
            f"Beside the loss with a second sigmoid stand the paper's {paper['ssm']:g} for ssm and "
            f"{paper['ed_lstm']:g} for ed_lstm ({paper['note']})."
        )
    return (
        f'<div class="wide"><table class="results"><thead><tr><th scope="col">by number of objects</th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>{listed}"
        f'<p class="small">{escape(" ".join(filter(None, explained)))}</p>'
    )


def dynamics(metrics: Mapping[str, Any]) -> str:
    """What was learnt of gravity, and how fast the filter forgets."""
    rows = []
    if metrics.get("gravity_px"):
        units = (
            ("pixels per frame², (y, x)", "px", ".4f"),
            ("world units per time², (y, x), y up", "world", ".2f"),
        )
        for unit, name, style in units:
            learnt, true = (
                ", ".join(format(v, style) for v in metrics[f"{kind}gravity_{name}"]) for kind in ("", "true_")
            )
            rows.append((f"gravity, {unit}", f"({learnt}), true ({true})"))
        rows.append(("strength over the true one, along it", f"{metrics['gravity_along']:.3f}"))
        if metrics["gravity_angle"] is not None:
            rows.append(("angle to the true one, in the frame", f"{metrics['gravity_angle']:.1f}°"))
    elif why := metrics.get("reasons", {}).get("gravity_px"):
        rows.append(("gravity", f"not known: {why}"))
    if spectrum := metrics.get("predictor_spectrum"):
        rows.append(("eigenvalues of the one-step predictor", ", ".join(f"{value:.3f}" for value in spectrum)))
    shown = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<h3>Learnt dynamics</h3><dl>{shown}</dl>" if len(rows) > 1 else ""


def curves(metrics: Mapping[str, Any]) -> str:
    """Errors over predicted frames and over the gap."""
    first = metrics.get("context", 0) + 1
    of_all = metrics.get("curves", {})
    of_groups = {name: group["curves"] for name, group in _named(metrics["by_objects"]).items()}
    plots = [
        (
            "Predicted positions by number of objects",
            {name: found.get("predict_error_px") for name, found in of_groups.items()},
        ),
        (
            "Predicted, objects apart and frames alone",
            {
                "k-means, model's frames": of_all.get("predict_kmeans_px"),
                "k-means, true frames": of_all.get("true_frames_predict_kmeans_px"),
                "model's positions": of_all.get("predict_apart_px"),
                VELOCITY: of_all.get("constant_velocity_predict_apart_px"),
                COPY: of_all.get("copy_last_predict_apart_px"),
            },
        ),
        (
            "Positions in the gap",
            {
                "interpolated": of_all.get("interpolate_error_px"),
                "predicted": of_all.get("predict_gap_error_px"),
                "inferred, all frames seen": of_all.get("encode_gap_error_px"),
            },
        ),
    ]
    drawn = []
    for title, lines in plots:
        series = {name: (range(first, first + len(line)), line) for name, line in lines.items() if line}
        if series:
            label = f"{title}, distance in pixels over frames"
            drawn.append(plot(title, figures.line_plot(series, x_label="frame", y_label="pixels", label=label)))
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def together(latent_tracks: Mapping[str, np.ndarray]) -> str:
    """Latent tracks of many clips in one plot each, a colour per slot (Fig. 5a)."""
    if not latent_tracks:
        return ""
    drawn = "".join(
        plot(
            f"{name}: {len(tracks)} clips",
            figures.track_plot(
                {"inferred": tracks},
                styles=TRACK_STYLES,
                frame=False,
                label=f"latent tracks of {len(tracks)} clips with {name}",
            ),
        )
        for name, tracks in latent_tracks.items()
    )
    explained = (
        "Inferred positions before the map, in latent units; a colour is a slot. Slots that keep to a region of their "
        "own exchange objects that fly through it. Tracks from both sides on top of each other are a fold."
    )
    return f'<h3>Latent tracks</h3><p class="small">{explained}</p><div class="thirds">{drawn}</div>'


def clip_tracks(clip: ReportClip) -> str:
    """Tracks of one clip in the frame and in latent units, and its frames laid over each other."""
    assert clip.tracks is not None
    rank = f'<span class="rank">{escape(clip.rank)}</span> ' if clip.rank else ""
    drawn = []
    for title, tracks, frame in (
        ("In the frame", clip.tracks.in_frame, True),
        ("Before the map", clip.tracks.latent, False),
    ):
        if tracks:
            label = f"tracks of clip {clip.key}: {', '.join(tracks)}"
            drawn.append(plot(title, figures.track_plot(tracks, styles=TRACK_STYLES, frame=frame, label=label)))
    parts = [f"<h3>{rank}Tracks of {escape(clip.key)}</h3>", f'<div class="thirds">{"".join(drawn)}</div>']
    if panels := _overlaid(clip):
        factor = max(1, round(160 / clip.frames.shape[1]))
        picture = figures.overlays(panels, factor=factor)
        alt = f"frames of clip {clip.key} laid over each other: {', '.join(panels)}"
        parts.append(f'<div class="wide">{still(picture, alt)}</div>')
    return f"<article>{''.join(parts)}</article>"


def _overlaid(clip: ReportClip) -> dict[str, np.ndarray]:
    assert clip.tracks is not None
    if clip.prediction is None:
        return {}
    panels = _panels(clip, {"predicted": clip.prediction})
    if (gap := clip.tracks.interpolated) is not None:
        panels |= _panels(clip, {"interpolated": gap, "predicted": clip.prediction[: len(gap)]})
    return panels


def _panels(clip: ReportClip, made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Frames made and true ones, with the numbers of the frames in the labels."""
    count = len(next(iter(made.values())))
    true = clip.frames[clip.context : clip.context + count]
    return {
        f"{label} {clip.context + 1}-{clip.context + count}": video for label, video in {**made, "true": true}.items()
    }


def _named(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{count} object{'s' * (count != '1')}": group for count, group in groups.items()}


def _rows(row: Row, groups: Mapping[str, Mapping[str, Any]], reasons: dict[str, int]) -> list[str]:
    best = {}
    for name, group in groups.items():
        values = [group[key] for key in row.keys.values() if group.get(key) is not None]
        if len(values) > 1 and row.higher is not None:
            best[name] = (max if row.higher else min)(values)
    sign = "" if row.higher is None else f' <span class="arrow">{"↑" if row.higher else "↓"}</span>'
    unit = f" ({row.unit})" if row.unit else ""
    told = []
    for number, (whose, key) in enumerate(row.keys.items()):
        name, arrow = (f"… {whose}", "") if number else (f"{row.label}{unit}" + f": {whose}" * bool(whose), sign)
        cells = "".join(
            cell(key, group.get(key) is not None and group[key] == best.get(of), group, row.unit, row.style, reasons)
            for of, group in groups.items()
        )
        told.append(f'<tr><th scope="row">{escape(name)}{arrow}</th>{cells}</tr>')
    return told
