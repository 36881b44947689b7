"""`hyperparameter_search` with Optuna, from the first trial to the best run."""

import pytest
import torch

from trainwright import Trainer, TrainerCallback
from trainwright.names import HPSearchBackend

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)

RATES = [0.001, 0.1, 0.01]  # per trial; the middle one learns most


def rates(trial):
    """A space of one value, which the number of the trial decides."""
    return {"learning_rate": trial.suggest_float("learning_rate", RATES[trial.number], RATES[trial.number])}


@pytest.fixture
def searching(make_trainer, line_model):
    """A Trainer that builds its model anew in each trial."""

    def make(trainer=None, **arguments):
        values = {"optim": "sgd", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, **arguments}
        return make_trainer(trainer={"model_init": line_model, **(trainer or {})}, **values)

    return make


def lone_loss(searching, rate):
    """The evaluation loss of a run outside any search."""
    trainer = searching(learning_rate=rate)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def test_the_best_run_is_the_trial_that_trained_best(searching):
    trainer = searching()
    best = trainer.hyperparameter_search(rates, n_trials=3, backend="optuna")
    losses = [lone_loss(searching, rate) for rate in RATES]
    assert best.run_id == "1" == str(losses.index(min(losses)))
    assert best.objective == pytest.approx(min(losses)) and best.hyperparameters == {"learning_rate": 0.1}


def test_the_direction_and_the_objective_are_the_callers(searching):
    best = searching().hyperparameter_search(
        rates, compute_objective=lambda metrics: -metrics["eval_loss"], n_trials=3, direction="minimize"
    )
    losses = [lone_loss(searching, rate) for rate in RATES]
    assert best.run_id == str(losses.index(max(losses))) and best.objective == pytest.approx(-max(losses))
    best = searching().hyperparameter_search(rates, n_trials=3, direction="maximize")
    assert best.run_id == str(losses.index(max(losses))) and best.objective == pytest.approx(max(losses))


def test_a_run_without_evaluations_is_evaluated_at_its_end(searching):
    best = searching(eval_strategy="no").hyperparameter_search(rates, n_trials=2)
    assert best.objective == pytest.approx(lone_loss(searching, RATES[1]))


def test_several_directions_return_the_pareto_front(searching):
    found = searching().hyperparameter_search(
        rates,
        compute_objective=lambda metrics: [metrics["eval_loss"], -metrics["eval_loss"]],
        n_trials=3,
        direction=["minimize", "minimize"],
    )
    assert sorted(run.run_id for run in found) == ["0", "1", "2"]  # each is better than the others in one of the two
    assert all(run.objective[0] == -run.objective[1] for run in found)


def test_a_pruned_trial_stops_at_the_step_where_it_was_pruned_and_ends_its_training(searching, line_model):
    from trainwright import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ends.append((state.trial_params["learning_rate"], state.global_step))

    ends = []
    trainer = searching(trainer={"callbacks": [Ends]}, max_steps=6)
    pruner = optuna.pruners.ThresholdPruner(upper=lone_loss(searching, RATES[0]))  # only the second trial gets below

    best = trainer.hyperparameter_search(rates, n_trials=2, pruner=pruner)
    assert best.run_id == "1"
    assert ends == [(0.001, 2), (0.1, 6)]


def test_each_trial_saves_into_a_directory_of_its_own(searching, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    searching(**arguments).hyperparameter_search(rates, n_trials=2)
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/checkpoint-*"))
    assert found == ["run-0/checkpoint-4", "run-1/checkpoint-4"]


def test_a_name_for_each_trial_is_its_directory_and_its_name_in_the_state(searching, tmp_path):
    from trainwright import TrainerState

    searching(save_strategy="steps", save_steps=4).hyperparameter_search(
        rates, n_trials=2, hp_name=lambda trial: f"rate-{trial.params['learning_rate']}"
    )
    state = TrainerState.load_from_json(tmp_path / "out" / "rate-0.1" / "checkpoint-4" / "trainer_state.json")
    assert (state.trial_name, state.trial_params) == ("rate-0.1", {"learning_rate": 0.1})
    assert state.is_hyper_param_search


def test_the_best_model_of_a_trial_is_found_in_its_directory(searching, tmp_path):
    trainer = searching(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    trainer.hyperparameter_search(rates, n_trials=2)
    assert trainer.state.best_model_checkpoint.startswith(str(tmp_path / "out" / "run-1"))


def test_a_model_init_that_takes_the_trial_sees_it_and_none_before_the_search(searching, line_model):
    seen = []

    def init(trial):
        seen.append(None if trial is None else trial.suggest_int("seed", trial.number, trial.number))
        return line_model(seed=seen[-1] or 0)

    best = searching(trainer={"model_init": init}).hyperparameter_search(rates, n_trials=2)
    assert seen == [None, 0, 1]
    assert best.hyperparameters == {"learning_rate": RATES[int(best.run_id)], "seed": int(best.run_id)}


def test_values_are_set_as_the_type_of_their_field(searching):
    def texts(trial):
        trial.suggest_categorical("learning_rate", ["1e-2"])
        trial.suggest_categorical("max_steps", ["3"])
        trial.suggest_categorical("lr_scheduler_type", ["cosine"])
        return None  # what was sampled is what is set

    trainer = searching()
    trainer.hyperparameter_search(texts, n_trials=1)
    assert (trainer.args.learning_rate, trainer.args.max_steps) == (1e-2, 3)
    assert type(trainer.args.max_steps) is int and trainer.args.lr_scheduler_type.name == "COSINE"
    assert trainer.state.global_step == 3


def test_a_searched_batch_size_is_the_one_trained_with(searching):
    sizes = []

    class Notes(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            sizes.append(len(inputs["x"]))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = searching(max_steps=1, eval_strategy="no")
    trainer.__class__ = Notes
    trainer._bind_hooks()
    trainer.hyperparameter_search(
        lambda trial: {"per_device_train_batch_size": trial.suggest_int("b", 3 + trial.number, 3 + trial.number)},
        n_trials=2,
    )
    assert sizes == [3, 4]


def test_the_engine_is_known_during_the_search_only(searching):
    trainer, during = searching(), []
    assert trainer.hp_search_backend is None

    def note(trial):
        during.append(trainer.hp_search_backend)
        return rates(trial)

    trainer.hyperparameter_search(note, n_trials=1)
    assert set(during) == {HPSearchBackend.OPTUNA} and trainer.hp_search_backend is None


def test_an_error_in_a_trial_ends_the_search_and_leaves_the_trainer_usable(searching):
    trainer = searching()
    with pytest.raises(ZeroDivisionError):
        trainer.hyperparameter_search(lambda trial: 1 / 0, n_trials=1)
    assert trainer.hp_search_backend is None
    trainer.train()
    assert trainer.state.global_step == 4 and not trainer.state.is_hyper_param_search


class Diverges(torch.nn.Module):
    """Gives NaN, or runs out of memory, where the learning rate asks for it."""

    def __init__(self, trainer, kind):
        super().__init__()
        self.linear, self.trainer, self.kind = torch.nn.Linear(3, 1), trainer, kind

    def forward(self, x, labels=None):
        loss = (self.linear(x) - labels).pow(2).mean()
        if self.training and self.trainer.args.learning_rate == RATES[1]:
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            loss = loss * float("nan")
        return {"loss": loss}


@pytest.mark.parametrize("kind", ["NaN", "memory"])
def test_a_trial_that_fails_by_itself_does_not_end_the_search(searching, caplog, kind):
    states = []
    parts = {"model_init": lambda: Diverges(trainer, kind) if made else torch.nn.Linear(1, 1)}
    made = []
    trainer = searching(trainer=parts)
    made.append(True)
    best = trainer.hyperparameter_search(
        rates, n_trials=3, callbacks=[lambda study, trial: states.append(trial.state.name)]
    )
    assert states == ["COMPLETE", "FAIL", "COMPLETE"] and best.run_id in ("0", "2")
    assert "TRIAL 1 FAILED and has no result; the search continues." in caplog.text
    assert {"NaN": "NonFiniteError: NaN or infinity", "memory": "OutOfMemoryError: CUDA"}[kind] in caplog.text


def test_a_mistake_in_code_still_ends_the_search(searching):
    def broken(trial):
        raise KeyError("colums")

    with pytest.raises(KeyError, match="colums"):
        searching().hyperparameter_search(broken, n_trials=3)


def test_the_trials_are_left_as_a_table_and_a_page_beside_their_checkpoints(searching, tmp_path, caplog):
    class PruneTheLast(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if args.learning_rate == RATES[2]:
                raise optuna.TrialPruned

    trainer = searching(trainer={"callbacks": [PruneTheLast()]}, log_level="info")
    best = trainer.hyperparameter_search(rates, n_trials=3)
    lines = (tmp_path / "out" / "search_trials.csv").read_text().splitlines()
    assert lines[0] == "trial,state,objective,learning_rate,duration_s"
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert [row["state"] for row in rows] == ["complete", "complete", "pruned"]
    assert [float(row["learning_rate"]) for row in rows] == RATES
    assert float(rows[int(best.run_id)]["objective"]) == best.objective
    assert all(float(row["duration_s"]) > 0 for row in rows)
    assert "objective over learning_rate" in (tmp_path / "out" / "search_report.html").read_text()
    assert "The trials, best first" in caplog.text


def test_the_table_is_written_where_a_trial_ends_the_search_with_an_error(searching, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.learning_rate == RATES[1]:
                raise KeyError("a mistake in a callback")

    with pytest.raises(KeyError):
        searching(trainer={"callbacks": [Fail()]}).hyperparameter_search(rates, n_trials=3)
    lines = (tmp_path / "out" / "search_trials.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["complete", "failed"]
