"""Searching with the real Optuna on a toy objective."""

import functools
import math

import optuna
import pytest

from trainwright.outputs import BestRun
from trainwright.search import optuna as engine

optuna.logging.set_verbosity(optuna.logging.ERROR)


def space(trial):
    return {"x": trial.suggest_float("x", -4, 4)}


def parabola(trial):
    return (engine.params_of(trial, space)["x"] - 1) ** 2


def test_the_best_run_carries_number_objective_and_hyper_parameters_of_the_best_trial():
    seen = {}

    def objective(trial):
        seen[trial.number] = (trial, parabola(trial))
        return seen[trial.number][1]

    best = engine.run(objective, 8, "minimize", space)
    number = min(seen, key=lambda n: seen[n][1])
    assert best == BestRun(str(number), seen[number][1], seen[number][0].params)
    assert best.run_summary is None


def test_maximize_returns_the_largest_objective():
    seen = []

    def objective(trial):
        seen.append(-parabola(trial))
        return seen[-1]

    assert engine.run(objective, 8, "maximize", space).objective == max(seen)


def test_several_directions_return_the_pareto_front():
    seen = {}

    def objective(trial):
        x = engine.params_of(trial, space)["x"]
        seen[str(trial.number)] = [x, -x]
        return x, -x

    best = engine.run(objective, 5, ["minimize", "minimize"], space)
    # x and -x cannot both fall, so no trial beats another and all are on the front.
    assert {run.run_id: run.objective for run in best} == seen


def test_a_wrong_number_of_objectives_stops_the_search_at_once():
    calls = []

    def objective(trial):
        calls.append(trial.number)
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="one number for each direction"):
        engine.run(objective, 3, "minimize", space)
    assert calls == [0]


def test_study_and_optimize_arguments_reach_the_function_that_takes_them(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    optimized = []
    engine.run(
        parabola,
        2,
        "minimize",
        space,
        study_name="toy",
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed=3),
        callbacks=[lambda study, trial: optimized.append(trial.number)],
    )
    assert optimized == [0, 1]
    assert len(optuna.load_study(study_name="toy", storage=storage).trials) == 2


def test_the_same_sampler_seed_finds_the_same_trials():
    runs = [engine.run(parabola, 4, "minimize", space, sampler=optuna.samplers.RandomSampler(seed=7)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_stored_study_is_continued_and_its_earlier_best_trial_counts(tmp_path):
    keep = {"study_name": "toy", "storage": f"sqlite:///{tmp_path}/study.db", "load_if_exists": True}
    engine.run(lambda trial: -100.0 + 0 * parabola(trial), 1, "minimize", space, **keep)
    best = engine.run(parabola, 2, "minimize", space, **keep)
    assert (best.run_id, best.objective) == ("0", -100.0)
    study = optuna.load_study(study_name="toy", storage=keep["storage"])
    assert [trial.number for trial in study.trials] == [0, 1, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [("minimize", "maximize"), ("maximize", "minimize"), (["minimize"] * 2, ["minimize", "maximize"])],
)
@pytest.mark.parametrize("by_object", [False, True])
def test_a_stored_study_with_another_direction_is_refused_before_its_first_trial(tmp_path, first, second, by_object):
    storage = f"sqlite:///{tmp_path}/study.db"
    storage = optuna.storages.RDBStorage(storage) if by_object else storage
    keep = {"study_name": "toy", "storage": storage, "load_if_exists": True}
    several = isinstance(first, list)
    calls = []

    def objective(trial):
        calls.append(trial.number)
        return [parabola(trial)] * 2 if several else parabola(trial)

    engine.run(objective, 1, first, space, **keep)
    with pytest.raises(ValueError, match=r"direction=\['m.*the stored study 'toy' has \['m") as caught:
        engine.run(objective, 1, second, space, **keep)
    assert calls == [0]
    for direction in (first, second):
        assert str(direction if several else [direction]) in str(caught.value)


def test_a_stored_study_with_another_number_of_directions_is_refused(tmp_path):
    keep = {"study_name": "toy", "storage": f"sqlite:///{tmp_path}/study.db", "load_if_exists": True}
    engine.run(parabola, 1, "minimize", space, **keep)
    with pytest.raises(ValueError, match="the stored study 'toy' has"):
        engine.run(parabola, 1, ["minimize", "maximize"], space, **keep)


def test_a_best_trial_of_another_search_space_is_named(tmp_path, caplog):
    keep = {"study_name": "toy", "storage": f"sqlite:///{tmp_path}/study.db", "load_if_exists": True}

    def other_space(trial):
        return {"y": trial.suggest_float("y", 0, 1)}

    engine.run(lambda trial: -1.0 + 0 * parabola(trial), 1, "minimize", space, **keep)
    assert "earlier search" not in caplog.text
    best = engine.run(
        lambda trial: 1.0 + 0 * engine.params_of(trial, other_space)["y"], 1, "minimize", other_space, **keep
    )
    assert best.run_id == "0"
    assert "number 0 of an earlier search, over ['x']; this one searched ['y']" in caplog.text


def test_a_hopeless_trial_is_pruned_in_the_middle():
    steps_done = {}

    def objective(trial):
        for step in range(5):
            steps_done[trial.number] = step + 1
            engine.report(trial, 100.0 * trial.number, step)
        return 100.0 * trial.number

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    best = engine.run(objective, 3, "minimize", space, pruner=pruner)
    assert best.run_id == "0"
    assert steps_done == {0: 5, 1: 1, 2: 1}


def test_several_objectives_are_not_reported_because_optuna_cannot_prune_by_them():
    study = optuna.create_study(directions=["minimize", "minimize"])
    trial = study.ask()
    engine.report(trial, [1.0, 2.0], 1)
    study.tell(trial, [1.0, 2.0])
    assert study.trials[0].intermediate_values == {}


def test_a_search_in_which_every_trial_was_pruned_says_so():
    def objective(trial):
        raise optuna.TrialPruned

    with pytest.raises(RuntimeError, match=r"None of the 2 trials completed.*pruned"):
        engine.run(objective, 2, "minimize", space)


def test_errors_named_in_catch_fail_the_trial_and_not_the_search():
    def objective(trial):
        if trial.number == 0:
            raise MemoryError("too large")
        return parabola(trial)

    assert engine.run(objective, 2, "minimize", space, catch=(MemoryError,)).run_id == "1"
    with pytest.raises(MemoryError):
        engine.run(objective, 2, "minimize", space)


def test_a_trial_with_a_nan_objective_is_never_the_best():
    best = engine.run(lambda t: math.nan if t.number == 0 else 5.0, 2, "minimize", space)
    assert (best.run_id, best.objective) == ("1", 5.0)


def test_several_jobs_are_refused_with_the_way_that_works():
    with pytest.raises(ValueError, match=r"n_jobs=2.*load_if_exists=True"):
        engine.run(parabola, 2, "minimize", space, n_jobs=2)


def test_an_unknown_argument_is_an_error_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"'studyname'.*Did you mean 'study_name'"):
        engine.run(parabola, 2, "minimize", space, studyname="toy")


def test_no_trials_at_all_is_an_error():
    with pytest.raises(ValueError, match="n_trials=0"):
        engine.run(parabola, 0, "minimize", space)


def test_constants_of_the_search_space_are_hyper_parameters_too():
    trial = optuna.create_study().ask()
    params = engine.params_of(trial, lambda t: {**space(t), "warmup_steps": 0.1})
    assert params == {"x": trial.params["x"], "warmup_steps": 0.1}


def test_a_search_space_that_returns_nothing_gives_what_the_trial_sampled():
    trial = optuna.create_study().ask()

    def sampling_only(t):
        t.suggest_int("seed", 3, 3)

    assert engine.params_of(trial, sampling_only) == {"seed": 3}


def test_a_search_space_of_the_wrong_type_is_an_error():
    with pytest.raises(TypeError, match="must return a dict"):
        engine.params_of(optuna.create_study().ask(), lambda t: [("seed", 1)])


def test_a_database_whose_tables_another_process_makes_at_that_moment_is_tried_again(tmp_path, monkeypatch):
    errors = pytest.importorskip("sqlalchemy.exc")
    create, calls = optuna.create_study, []

    @functools.wraps(create)  # whose arguments the search looks up
    def create_study(**kwargs):
        calls.append(kwargs["study_name"])
        if len(calls) < 3:
            raise errors.OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
        return create(**kwargs)

    monkeypatch.setattr(optuna, "create_study", create_study)
    monkeypatch.setattr(engine, "WAIT_TO_CREATE_S", 0.0)
    stored = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "toy", "load_if_exists": True}
    best = engine.run(lambda trial: trial.suggest_float("x", 0, 1), 1, "minimize", **stored)
    assert best.run_id == "0" and len(calls) == 3
    calls.clear()
    with pytest.raises(errors.OperationalError):  # a study of one process: an error is an error
        engine.run(lambda trial: 0.0, 1, "minimize", **stored | {"load_if_exists": False})
    assert len(calls) == 1
