"""Searching with the real Ray Tune on a toy objective; skipped where Ray is not installed."""

import json
import os

import pytest

ray = pytest.importorskip("ray")
tune = pytest.importorskip("ray.tune")

from trainwright.search import ray as engine  # noqa: E402 - after the skip
from trainwright.search.backends import SearchContext  # noqa: E402
from trainwright.search.failures import TrialFailed  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def grid(trial):
    return {"x": tune.grid_search([3.0, 1.0, 2.0])}


def test_the_best_run_carries_the_trial_its_objective_and_the_analysis(tmp_path):
    best = engine.run(lambda trial: trial["x"] ** 2, 1, "minimize", grid, storage_path=str(tmp_path), verbose=0)
    assert best.objective == 1.0
    assert best.hyperparameters == {"x": 1.0}
    results = {trial.trial_id: trial.last_result["objective"] for trial in best.run_summary.trials}
    assert sorted(results.values()) == [1.0, 4.0, 9.0]
    assert results[best.run_id] == 1.0


@pytest.mark.parametrize(
    "told", [{"mode": "max"}, {"scheduler": tune.schedulers.ASHAScheduler(metric="objective", mode="max")}]
)
def test_a_mode_against_the_direction_is_refused(told):
    with pytest.raises(ValueError, match=r"direction='minimize', but .*mode.* is 'max'"):
        engine.run(lambda trial: trial["x"], 1, "minimize", grid, **told)


def test_a_trial_that_fails_by_itself_is_left_out(tmp_path):
    def objective(trial):
        if trial["x"] == 1.0:
            raise TrialFailed("NaN")
        return trial["x"]

    context = SearchContext()
    best = engine.run(objective, 1, "minimize", grid, context, storage_path=str(tmp_path), verbose=0)
    assert (best.hyperparameters, best.objective) == ({"x": 2.0}, 2.0)
    found = {record.params["x"]: (record.state, record.values) for record in context.trials}
    assert found == {3.0: ("complete", (3.0,)), 1.0: ("failed", ()), 2.0: ("complete", (2.0,))}


def test_maximize_and_the_scope_decide_which_result_counts(tmp_path):
    def objective(trial):
        for step, value in enumerate([10.0 - trial["x"], trial["x"]]):
            engine.report(trial, value, step, {"eval_loss": value})
        return trial["x"]

    def best(scope):
        folder = str(tmp_path / scope)
        context = SearchContext(ray_scope=scope)
        return engine.run(objective, 1, "maximize", grid, context, storage_path=folder, verbose=0)

    assert (best("last").hyperparameters, best("last").objective) == ({"x": 3.0}, 3.0)
    assert (best("all").hyperparameters, best("all").objective) == ({"x": 1.0}, 9.0)


def test_a_scheduler_with_a_metric_of_its_own_is_accepted_and_ends_bad_trials(tmp_path):
    def objective(trial):
        for step in range(20):
            engine.report(trial, trial["x"], step)
        return trial["x"]

    scheduler = tune.schedulers.ASHAScheduler(metric="objective", mode="min", grace_period=1, max_t=10)
    best = engine.run(objective, 1, "minimize", grid, scheduler=scheduler, storage_path=str(tmp_path), verbose=0)
    assert best.hyperparameters == {"x": 1.0}
    assert max(trial.last_result["training_iteration"] for trial in best.run_summary.trials) <= 10


def test_a_failed_trial_continues_from_its_last_checkpoint_under_its_own_name(tmp_path):
    def objective(trial, checkpoint_dir=None):
        if checkpoint_dir is not None:
            with open(os.path.join(checkpoint_dir, "trainer_state.json")) as file:
                assert os.path.basename(checkpoint_dir) == f"checkpoint-{json.load(file)['global_step']}"
            return 1.0
        written = tmp_path / "report" / "checkpoint-7"
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
        engine.report(trial, 5.0, 7, checkpoint_dir=str(written.parent))
        raise RuntimeError("lost its machine")

    best = engine.run(
        objective,
        1,
        "minimize",
        lambda trial: {"x": 1},
        storage_path=str(tmp_path / "ray"),
        max_failures=1,
        verbose=0,
        raise_on_failed_trial=False,
    )
    assert best.objective == 1.0


def test_a_scheduler_that_compares_trials_needs_evaluations_during_training():
    with pytest.raises(ValueError, match=r"AsyncHyperBandScheduler.*eval_strategy"):
        engine.run(
            lambda trial: 0.0,
            1,
            "minimize",
            grid,
            SearchContext(evaluates_while_training=False),
            scheduler=tune.schedulers.ASHAScheduler(),
        )
