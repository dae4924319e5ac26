"""Search spaces and objectives as written on a command line: what they become, and what is refused with which words."""

import random

import pytest

from pipeline import space
from pipeline.config import SweepRun, with_overrides
from pipeline.presets import PRESETS
from pipeline.space import Distribution, Objective

IODINE = PRESETS["iodine"]["debug"]
DDLP = PRESETS["ddlp"]["small"]


def test_words_become_distributions():
    found = space.parse_space(
        [
            "model.likelihood_weight=log:0.01:1",
            "optim.lr=uniform:0.0001:0.01",
            "model.num_refinements=int:2:8",
            "model.refine_dim=logint:8:512",
            "model.entropy_weight=choice:0,0.01,0.1",
            "model.mixture=choice:per_pixel,per_channel",
            "optim.clip_norm=choice:5,none",
            "model.leave_one_out=choice:true,false",
        ],
        IODINE,
    )
    assert found["model.likelihood_weight"] == Distribution("log", "log:0.01:1", 0.01, 1.0)
    assert found["optim.lr"].kind == "uniform"
    assert found["model.num_refinements"].ends == (2, 8)
    assert found["model.refine_dim"] == Distribution("logint", "logint:8:512", 8, 512)
    assert found["model.entropy_weight"].choices == (0.0, 0.01, 0.1)
    assert found["model.mixture"].choices == ("per_pixel", "per_channel")
    assert found["optim.clip_norm"].choices == (5.0, None)
    assert found["model.leave_one_out"].choices == (True, False)


def test_choices_of_lists_are_kept_as_text_and_applied_as_lists():
    found = space.parse_space(["model.prior_channels=choice:[8,16,32],[16,32,64]"], DDLP)
    assert found["model.prior_channels"].choices == ("[8, 16, 32]", "[16, 32, 64]")
    run = space.apply(DDLP, {"model.prior_channels": "[16, 32, 64]", "optim.lr": 1e-3})
    assert run == with_overrides(DDLP, {"model.prior_channels": (16, 32, 64), "optim.lr": 1e-3})


def test_draws_stay_inside_and_reach_everything():
    rng = random.Random(1)
    log = Distribution("log", "", 0.01, 1.0)
    drawn = [log.draw(rng) for _ in range(2000)]
    assert all(0.01 <= value <= 1 for value in drawn)
    assert 0.45 < sum(value < 0.1 for value in drawn) / 2000 < 0.55  # half of it below the geometric middle
    assert {Distribution("int", "", 2, 4).draw(rng) for _ in range(100)} == {2, 3, 4}
    assert {Distribution("logint", "", 1, 3).draw(rng) for _ in range(100)} == {1, 2, 3}
    assert {Distribution("choice", "", choices=("a", None)).draw(rng) for _ in range(50)} == {"a", None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the search space is empty.*--ready-made"),
        (["model.kl_weight"], "FIELD=DISTRIBUTION"),
        (["kl_weight=log:0.1:1"], "did you mean model.kl_weight"),
        (["model.likelihod_weight=log:0.1:1"], "did you mean model.likelihood_weight"),
        (["model.kl_weight=log:1:0.1"], "least value 1 must be below the greatest 0.1"),
        (["model.kl_weight=log:1:1"], "must be below"),
        (["model.kl_weight=log:0:1"], "cannot hold 0.*uniform:0:1"),
        (["model.kl_weight=uniform:0:inf"], "must be below"),
        (["model.kl_weight=normal:0:1"], "a distribution is log:LOW:HIGH"),
        (["model.kl_weight=log:0.1"], "give log two numbers"),
        (["model.num_slots=uniform:2:8"], "no real number; give int"),
        (["model.num_slots=int:2:8.5"], "two whole numbers"),
        (["model.num_slots=logint:0:8"], "int:0:8"),
        (["model.mixture=int:1:2"], "no number; give choice"),
        (["model.mixture=choice:per_pixel,per_planet"], "per_planet"),
        (["model.num_slots=choice:4"], "two choices or more; --set model.num_slots=4"),
        (["model.num_slots=choice:4,4"], "twice"),
        (["model.num_slots=int:-1:4"], "-1 cannot be"),
        (["model.kl_weight=log:0.1:1", "model.kl_weight=log:0.1:2"], "twice"),
        (["seed=int:0:9"], "--seeds"),
        (["out=choice:a,b"], "folder of its own"),
        (["eval_every=int:1:9"], "could not be compared"),
        (["loader.prefetch=int:1:4"], "changes no result"),
        (["model.beta=log:0.1:1"], "did you mean model.likelihood_weight"),
        (["optim.betas=choice:[0.9,0.99],[0.9"], "write lists as choice"),
        (["model=choice:a,b"], "settings of its own"),
    ],
)
def test_impossible_spaces_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        space.parse_space(words, IODINE)


def test_an_end_that_only_others_make_possible_is_no_error():
    run = with_overrides(DDLP, {"model.num_particles": 10, "model.num_proposals": 24})
    few = "model.num_proposals=choice:8,24"  # 8 proposals are too few for 10 particles
    with pytest.raises(ValueError, match="8 cannot be"):
        space.parse_space([few], run)
    assert space.parse_space([few, "model.num_particles=int:4:24"], run)["model.num_proposals"].choices == (8, 24)


@pytest.mark.parametrize("family", PRESETS)
def test_every_family_has_a_ready_made_space(family):
    run = PRESETS[family]["small"]
    found = space.parse_space(space.ready_made(run), run)
    rng = random.Random(0)
    for _ in range(20):
        space.apply(run, {name: distribution.draw(rng) for name, distribution in found.items()})
    wanted = {"ddlp": "model.kl_balance", "provide": "model.likelihood_var", "iodine": "model.entropy_weight",
              "oddn": "model.rollout_weight", "ssm": "model.anneal_steps"}  # fmt: skip
    assert wanted.get(family, next(iter(found))) in found


def test_objectives():
    assert Objective.parse("fg_ari:max") == Objective("fg_ari", "maximize")
    assert Objective.parse("step_seconds") == Objective("step_seconds", "minimize")
    assert Objective.parse("anything:min") == Objective("anything", "minimize")
    for word in ("anything", "fg_ari:best", ":max", ""):
        with pytest.raises(ValueError, match="NAME:max or NAME:min"):
            Objective.parse(word)


def test_notes_tell_what_a_search_cannot_change_and_what_losses_cannot_compare():
    run = PRESETS["iodine"]["small"]
    found = space.parse_space(["model.num_refinements=int:2:8"], run)
    told = space.notes(found, {"model.num_slots": 5}, run, [Objective("loss", "minimize")])
    assert "stage 1 of 4 sets model.num_refinements, model.num_slots itself" in told[0]
    assert "losses of different trials do not compare" in told[-1]
    rates = space.parse_space(["optim.lr=log:1e-4:1e-2"], IODINE)
    assert space.notes(rates, {}, IODINE, [Objective.parse("fg_ari")]) == []


def test_a_field_that_every_stage_sets_is_refused():
    run = with_overrides(IODINE, {"stages": ("steps=5 optim.lr=1e-3", "optim.lr=1e-4")})
    with pytest.raises(ValueError, match="every stage of the run sets it itself"):
        space.parse_space(["optim.lr=log:1e-4:1e-2"], run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trials": 0}, "trials must be at least 1"),
        ({"reduction": 1, "pruner": "asha"}, "at least 2"),
        ({"gpus": 1.5}, "share of a GPU"),
        ({"min_steps": 5}, "add --pruner asha"),
        ({"reduction": 3}, "add --pruner asha"),
        ({"workers": 2, "gpus": 0.5}, "trials of one worker"),
        ({"pruner": "asha", "objective": ("fg_ari", "step_seconds")}, "one objective"),
        ({"threads": 0}, "threads"),
        ({"study": ""}, "name"),
        ({"retries": -1}, "retries"),
    ],
)
def test_sweep_run_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepRun("iodine/debug", **fields)
