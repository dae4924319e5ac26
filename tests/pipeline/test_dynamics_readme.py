"""The README's example of finding what moves runs on tables and a probe, and finds the motion that was planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store, tables
from pipeline.tables import Block, Provenance

HEADING = "### Finding what moves"
EXAMPLE = """
create view motion as  -- the objects with their velocity in pixels per frame, from their dynamics vectors
select clip, track, frame, mask_area, static,
    15.5 * (list_dot_product(dynamics::double[], weight[1]) + bias[1]) as velocity_y,
    15.5 * (list_dot_product(dynamics::double[], weight[2]) + bias[2]) as velocity_x
from 'TABLES/objects/*.parquet', (select weight, bias from 'REPORT/probe.json')
where kind = 'posterior' and frame > 0  -- the first frame has none before it that it could move from
    and mask_area between 0.001 and 0.1;  -- neither an empty slot nor a part of the background

create view objects as  -- one row per object: how fast it is, and what it looks like where it is seen best
select clip, track, count(*) as frames, median(sqrt(velocity_y ** 2 + velocity_x ** 2)) as speed,
    arg_max(static, mask_area) as look
from motion group by clip, track;

-- which objects move
select clip, track, frames, speed from objects where speed > 0.5 order by clip, track;

-- when they change their motion, for example because they are hit
select clip, track, frame, sqrt((velocity_y - lag(velocity_y) over path) ** 2
    + (velocity_x - lag(velocity_x) over path) ** 2) as change
from motion window path as (partition by clip, track order by frame)
qualify change > 1 order by clip, track, frame;

-- the object of another clip that looks most like each moving one
select a.clip, a.track, b.clip as other_clip, b.track as other_track, list_distance(a.look, b.look) as distance
from objects a join objects b on a.clip <> b.clip where a.speed > 0.5
qualify row_number() over (partition by a.clip, a.track order by distance) = 1 order by a.clip, a.track;
"""
"""As it stands in the README; 15.5 is for frames of 32 pixels."""
FRAMES, SLOTS = 6, 5
MIX = np.array([[2.0, -1.0], [0.5, 3.0], [1.0, 0.0], [0.0, -4.0]])
GROUND, MOVER, STILL, HIT, EMPTY = range(SLOTS)
AREA = np.array([0.8, 0.05, 0.04, 0.06, 0.0])
PROVENANCE = Provenance("oddn", "m" * 64, "d" * 64, "test", object_is_track=False)


def velocity() -> np.ndarray:
    """In pixels per frame, (t, k, 2): one moves steadily, one rests, one is hit at frame 3."""
    planted = np.zeros((FRAMES, SLOTS, 2))
    planted[:, MOVER] = [0.6, -0.8]
    planted[3:, HIT] = [0.0, 2.0]
    planted[:, GROUND] = planted[:, EMPTY] = [50.0, 50.0]  # what a probe says of them means nothing
    return planted


def look(clip: int) -> np.ndarray:
    """(k, 3): object k of one clip looks like object k of the other."""
    return np.eye(SLOTS)[:, :3] + np.arange(SLOTS)[:, None] + 0.01 * clip


def block(clip: int) -> Block:
    """Slots are in another order in every frame; ``track`` knows."""
    order = np.stack([np.roll(np.arange(SLOTS), t + clip) for t in range(FRAMES)])
    dynamics = (velocity() / 15.5) @ MIX.T
    dynamics[0] = 1e3  # of the first frame it is not defined
    of_slots = {
        "static": np.broadcast_to(look(clip), (FRAMES, SLOTS, 3)),
        "dynamics": dynamics,
        "track": np.broadcast_to(np.arange(SLOTS), (FRAMES, SLOTS)).astype(np.int32),
        "mask_area": np.broadcast_to(AREA, (FRAMES, SLOTS)),
    }
    shuffled = {name: np.stack([values[t, o] for t, o in enumerate(order)]) for name, values in of_slots.items()}
    return Block(f"clip-{clip}", "posterior", np.arange(FRAMES), np.arange(FRAMES), shuffled)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Any, ...]]]:
    import duckdb

    folder = tmp_path_factory.mktemp("dynamics")
    fields = ("static", "dynamics", "track", "mask_area")
    for clip in range(2):  # a part per shard
        rows = tables.build("objects", [block(clip)], fields, PROVENANCE)
        tables.publish(rows, str(folder / "tables" / "objects" / f"shard-{clip:05d}.parquet"))
    inverse = np.linalg.pinv(MIX)
    # With the fields that a real one has, of which one is also a column of the tables.
    probe = {
        "schema": 1,
        "kind": "probe",
        "model": "m",
        "column": "dynamics",
        "weight": inverse.tolist(),
        "bias": [0.0, 0.0],
    }
    store.publish_json(str(folder / "report" / "probe.json"), probe)
    code = EXAMPLE.replace("TABLES", str(folder / "tables")).replace("REPORT", str(folder / "report"))
    connection = duckdb.connect()
    return [connection.execute(statement).fetchall() for statement in connection.extract_statements(code)]


def test_the_objects_that_move_are_found_and_the_background_is_not(answers: list[list[tuple[Any, ...]]]):
    moving = answers[2]
    assert [row[:3] for row in moving] == [
        (clip, track, FRAMES - 1) for clip in ("clip-0", "clip-1") for track in (MOVER, HIT)
    ]
    assert [row[3] for row in moving] == pytest.approx([1.0, 2.0] * 2, rel=1e-4)


def test_the_hit_is_found_in_its_frame(answers: list[list[tuple[Any, ...]]]):
    assert [row[:3] for row in answers[3]] == [("clip-0", HIT, 3), ("clip-1", HIT, 3)]
    assert [row[3] for row in answers[3]] == pytest.approx([2.0, 2.0], rel=1e-4)


def test_the_static_columns_tell_which_objects_look_alike(answers: list[list[tuple[Any, ...]]]):
    assert [row[:4] for row in answers[4]] == [
        (clip, track, other, track)
        for clip, other in (("clip-0", "clip-1"), ("clip-1", "clip-0"))
        for track in (MOVER, HIT)
    ]
    assert answers[4][0][4] == pytest.approx(0.01 * np.sqrt(3), rel=1e-3)


def test_the_readme_has_this_example(repository: Path):
    text = (repository / "README.md").read_text()
    if HEADING not in text:
        pytest.skip("the README has no section on finding what moves")
    assert EXAMPLE in text.split(HEADING)[1]
