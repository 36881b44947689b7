"""Where a resumed run goes on, and what a checkpoint says about it."""

import json
import logging
import types

import pytest
import torch

from trainwright import TrainerCallback, TrainerState
from trainwright.callbacks.handler import CallbackHandler, exported_callbacks, restore_callbacks
from trainwright.checkpoint.accept import accept
from trainwright.data import collator_rng
from trainwright.plan import plan_training
from trainwright.run import loop_state
from trainwright.run.resume import (
    batching,
    find_checkpoint,
    initial_state,
    micro_batches_done,
    plan_from_here,
    read_state,
    report_changes,
    restore_loop,
    restore_optimizer,
    restore_weights,
    say_where,
    warn_of_another_run,
)
from trainwright.state import ExportableState, TrainerControl
from trainwright.techniques import averaging
from trainwright.window import LossWindow


def window_with(*losses):
    window = LossWindow(True)
    for loss in losses:
        window.add(torch.tensor(loss))
    return window


def read(directory, window, step=8, **processes):
    return loop_state.read(
        str(directory), window, global_step=step, updates_per_epoch=3, samples_per_update=8, **processes
    )


def test_what_a_checkpoint_says_of_the_loop_brings_it_back(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=3, logging_steps=2, save_strategy="steps", save_steps=3)
    trainer.train()
    path = tmp_path / "out" / "checkpoint-3" / "loop_state.json"
    saved = json.loads(path.read_text())
    assert saved.keys() - {"processes"} == loop_state.LoopState.__annotations__.keys() - {"processes"}
    window = LossWindow(True)
    found = read(path.parent, window, step=3)
    assert found == saved and len(window) == 1  # of step 3
    assert found["position"] == {"epoch": 0, "samples_in_epoch": 3 * 4} and found["last_logged_step"] == 2
    assert found["total_loss"] == pytest.approx(2 * trainer.state.log_history[0]["loss"], rel=1e-4)
    assert found["arguments"]["learning_rate"] == 0.1 and found["save_only_model"] is False


@pytest.mark.parametrize(("step", "epoch", "samples"), [(0, 0, 0), (2, 0, 16), (3, 1, 0), (8, 2, 16)])
def test_without_such_a_file_the_position_is_counted_in_steps(tmp_path, step, epoch, samples):
    found = read(tmp_path, LossWindow(True), step=step)
    assert found["position"] == {"epoch": epoch, "samples_in_epoch": samples}
    assert found["last_logged_step"] == step and found["total_loss"] == 0.0


def plan(num_batches, num_examples, accumulation=1, epochs=1, max_steps=-1):
    return plan_training(
        len_dataloader=num_batches,
        num_examples=num_examples,
        total_train_batch_size=4 * accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps if num_batches else 9,
    )


def batching_of(found, accumulation=1, strategy="random"):
    args = types.SimpleNamespace(gradient_accumulation_steps=accumulation, train_sampling_strategy=strategy)
    return batching(4, found, args)


def done(samples, found, **options):
    return micro_batches_done(loop_state.initial(0, samples), batching_of(found, **options), found)


@pytest.mark.parametrize(("samples", "expected"), [(0, 0), (4, 1), (8, 2), (20, 5), (22, 6)])
def test_whole_micro_batches_are_counted(samples, expected):
    assert done(samples, plan(6, 22)) == expected


def test_after_a_change_of_the_batch_size_what_is_left_reaches_the_end_of_the_epoch():
    for samples in range(1, 22):
        num_left = 6 - done(samples, plan(6, 22))
        assert 0 <= num_left * 4 - (22 - samples) < 4
        num_left = 5 - done(samples, plan(5, 22))  # what fills no batch is dropped
        assert 0 <= (22 - samples) - num_left * 4 < 4


def test_micro_batches_that_are_planned_together_are_left_together():
    for samples in range(1, 40):
        num_left = 9 - done(samples, plan(9, 34), accumulation=3, strategy="batch_rebalance")  # updates of 12, 12, 10
        assert num_left == 3 * -(-max(0, 34 - samples) // 12)


def test_the_number_of_micro_batches_is_the_checkpoint_s_as_long_as_their_size_is():
    found = plan(6, 60)  # batches of unequal size
    now = batching_of(found)
    saved = loop_state.initial(0, 8) | {"micro_batches": 2, "batching": json.loads(json.dumps(now))}
    assert micro_batches_done(saved, now, found) == 2
    assert micro_batches_done(saved, now | {"gradient_accumulation_steps": 2}, found) == 0  # 13 batches of 4 are left
    uncounted = loop_state.initial(0, 40) | {"batching": now}
    assert micro_batches_done(uncounted, now, found) == 1  # 20 samples are left, which are 5 batches of 4


def test_a_loader_without_length_counts_from_the_front():
    assert done(11, plan(None, None)) == 2


def test_epochs_or_steps_that_are_left_are_counted_from_where_a_run_goes_on():
    found = plan(10, 40, accumulation=2, epochs=3)  # 5 updates an epoch
    assert plan_from_here(found, 1, 4, 7, 2) == found
    assert plan_from_here(found, 1, 3, 7, 2).max_steps == 7 + 4 + 5  # 7 micro-batches are left of epoch 1
    assert plan_from_here(found, 4, 0, 9, 2).max_steps == 9  # further than its epochs: nothing is left
    found = plan(10, 40, accumulation=2, max_steps=12)
    assert plan_from_here(found, 1, 4, 7, 2) == found and found.num_train_epochs == 3
    assert plan_from_here(found, 4, 4, 7, 2).num_train_epochs == 6  # 3 updates end epoch 4, 2 are left
    assert plan_from_here(found, 4, 0, 20, 2).max_steps == 12
    assert plan_from_here(plan(None, None), 0, 3, 7, 2) == plan(None, None)


THREE_EPOCHS = plan(10, 40, accumulation=2, epochs=3)  # of 5 updates, 8 samples each


def restored(checkpoint, step, *, index=0, number=1, collator=None, found=THREE_EPOCHS, **settings):
    """What `restore_loop` put into a run that had nothing, and what it returned."""
    run = types.SimpleNamespace(window=LossWindow(True), owes_epoch_end="untouched", put_back=None)
    defaults = {
        "gradient_accumulation_steps": 2, "train_sampling_strategy": "random", "ignore_data_skip": False,
        "num_train_epochs": 3, "max_steps": -1,
        "packs": False, "packing": False, "packing_length": None, "packing_long_samples": "split",
    }  # fmt: skip
    run.args = types.SimpleNamespace(**defaults | settings)
    run.load_state_dict = lambda *values: setattr(run, "put_back", values)
    strategy = types.SimpleNamespace(process_index=index, num_processes=number, is_main=index == 0)
    returned = restore_loop(
        run, found, checkpoint, TrainerState(global_step=step),
        samples_per_micro_batch=4, collator=collator, strategy=strategy,
    )  # fmt: skip
    assert run.put_back[0] is returned and run.put_back[2] == batching_of(found, accumulation=2)
    return run


def written(directory, epoch, samples, **fields):
    state = {"window": window_with(0.5).state(), "last_logged_step": 3, "total_loss": 1.5, **fields}
    (directory / "loop_state.json").write_text(json.dumps(loop_state.initial(epoch, samples) | state))
    return str(directory)


def test_a_run_that_begins_is_put_at_the_start_of_its_plan(caplog):
    run = restored(None, 0)
    saved, found, _, micro_batches = run.put_back
    assert (saved, found, micro_batches) == (loop_state.initial(), THREE_EPOCHS, 0)
    assert len(run.window) == 0 and caplog.records == [] and run.owes_epoch_end == "untouched"


def test_a_checkpoint_without_a_loop_state_is_put_at_its_step(tmp_path):
    run = restored(str(tmp_path), 7)
    saved, found, _, micro_batches = run.put_back
    assert saved == loop_state.initial(1, 16, last_logged_step=7) and micro_batches == 4
    assert found == THREE_EPOCHS and run.owes_epoch_end is False


def test_each_process_puts_back_its_part_of_the_loss_and_only_the_first_says_where(tmp_path, caplog):
    parts_of(tmp_path, (0.5, 0.25), (1.5, 0.5))
    for index, mean in enumerate((0.75, 2.0)):
        caplog.clear()
        run = restored(str(tmp_path), 1, index=index, number=2)
        assert run.window.take()[0] == mean
        said = [record.getMessage() for record in caplog.records]
        name = tmp_path.name
        assert said == ([f"Resumed from {name}: step 1 of 16, 4 samples into epoch 0."] if index == 0 else [])


@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True)])
def test_packs_that_begin_or_end_within_an_epoch_are_refused_and_after_one_they_are_not(tmp_path, then, now):
    settings = {"packing": now, "packs": now, "packing_length": None}
    arguments = {"packing": then, "packing_length": None}
    with pytest.raises(ValueError, match=f"made within an epoch with packing={then}, and now packing={now}"):
        restored(written(tmp_path, 1, 8, arguments=arguments), 6, **settings)
    assert restored(written(tmp_path, 1, 0, arguments=arguments), 5, **settings).put_back[3] == 0


def test_the_generator_of_a_collator_draws_what_it_would_have_drawn(tmp_path):
    collator = types.SimpleNamespace(generator=torch.Generator().manual_seed(3))
    path = written(tmp_path, 1, 8, collator_generator=collator_rng.states(collator))
    expected = torch.rand(2, generator=collator.generator)
    restored(path, 6, collator=collator)
    assert torch.equal(torch.rand(2, generator=collator.generator), expected)


@pytest.mark.parametrize(
    ("step", "samples", "is_owed", "expected"),
    [(5, 0, True, True), (5, 0, False, False), (6, 8, True, False), (15, 8, True, True), (15, 8, False, False)],
)
def test_the_end_of_an_epoch_is_owed_between_epochs_and_after_the_last_update(
    tmp_path, step, samples, is_owed, expected
):
    epoch = 1 if step < 15 else 2
    found = plan(10, 40, accumulation=2, max_steps=15)
    run = restored(written(tmp_path, epoch, samples, owes_epoch_end=is_owed), step, found=found)
    assert run.owes_epoch_end is expected


def test_an_epoch_begins_anew_where_data_are_not_skipped(tmp_path, caplog):
    run = restored(written(tmp_path, 1, 8, owes_epoch_end=True), 6, ignore_data_skip=True)
    saved, found, _, micro_batches = run.put_back
    assert saved["position"] == {"epoch": 1, "samples_in_epoch": 0} and micro_batches == 0
    assert found.max_steps == 6 + 5 + 5 and run.owes_epoch_end is False  # the place was within an epoch
    assert "step 6 of 16, 0 samples into epoch 1." in caplog.text


def parts_of(tmp_path, *sums):
    windows = [window_with(*losses) for losses in sums]
    states = [
        {"window": window.state(), "epoch_start_generators": None, "collator_generator": None} for window in windows
    ]
    saved = loop_state.initial(0, 4) | loop_state.of_all_processes(states[0], gather=lambda own: states)
    (tmp_path / "loop_state.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("index", "number", "expected"), [(0, 2, 0.75), (1, 2, 2.0), (0, 1, 1.375), (0, 3, 1.375), (2, 3, 1.375)]
)
def test_each_process_gets_its_part_of_the_running_loss_and_others_the_mean(tmp_path, index, number, expected):
    parts_of(tmp_path, (0.5, 0.25), (1.5, 0.5))
    window = LossWindow(True)
    read(tmp_path, window, step=2, process_index=index, num_processes=number)
    assert len(window) == 2 and window.take()[0] == expected


def test_nothing_is_looked_for_unless_asked(tmp_path):
    for wanted in (None, False):
        assert find_checkpoint(wanted, str(tmp_path / "absent"), True) is None


def test_a_checkpoint_is_found_by_its_path_or_as_the_newest(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    out = tmp_path / "out"
    left = list(out.iterdir())
    assert find_checkpoint(True, str(out), True) == find_checkpoint("auto", str(out), True) == str(out / "checkpoint-1")
    assert find_checkpoint(str(out / "checkpoint-1"), "elsewhere", True) == str(out / "checkpoint-1")
    assert sorted(out.iterdir()) == sorted(left)


def test_a_process_that_is_not_the_first_does_not_look_by_itself(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    left = tmp_path / "out" / ".checkpoint-2.staged-999999999"
    left.mkdir()
    assert find_checkpoint(True, str(tmp_path / "out"), False) is None and left.exists()
    assert find_checkpoint(True, str(tmp_path / "out"), True) is not None and not left.exists()


def test_auto_starts_where_there_is_no_checkpoint_yet_and_true_does_not(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        assert find_checkpoint("auto", str(directory), True) is None
        with pytest.raises(ValueError, match="There is no checkpoint"):
            find_checkpoint(True, str(directory), True)


def test_auto_never_starts_anew_over_checkpoints_that_are_all_damaged(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    for number in (1, 2):
        (tmp_path / "out" / f"checkpoint-{number}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Every checkpoint in .* is damaged"):
        find_checkpoint("auto", str(tmp_path / "out"), True)
    with pytest.raises(ValueError, match=r"checkpoint-1\.damaged, checkpoint-2\.damaged.*To start anew"):
        find_checkpoint("auto", str(tmp_path / "out"), True)  # and not at the next attempt of a queue either


def test_a_number_is_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match="True for the newest checkpoint, or 'auto'"):
        find_checkpoint(3, str(tmp_path), True)


def test_a_requeued_job_starts_first_and_goes_on_later_with_the_same_arguments(make_trainer):
    steps = []
    for _ in range(2):
        trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=2, resume_from_checkpoint="auto")
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        steps.append(trainer._run.first_step)
    assert steps == [0, 3]


def settings(**values):
    return types.SimpleNamespace(**{"logging_steps": 10, "eval_steps": 20, "save_steps": 30, "n_gpu": 0, **values})


SAVED = {"logging_steps": 10, "eval_steps": 20, "save_steps": 30, "max_steps": 100, "train_batch_size": 4}


@pytest.mark.parametrize(
    ("now", "train_batch_size", "changed"),
    [
        ({"logging_steps": 5}, 4, ["logging_steps: 5 (from args) != 10"]),
        (
            {"eval_steps": 40, "save_steps": 60},
            4,
            ["eval_steps: 40 (from args) != 20", "save_steps: 60 (from args) != 30"],
        ),
        ({"save_steps": 0.5}, 4, ["save_steps: 50 (from args) != 30"]),  # of 100 steps
        ({}, 8, ["per_device_train_batch_size: 8 (from args) != 4"]),
        ({"n_gpu": 2}, 6, ["per_device_train_batch_size: 3 (from args) != 2"]),
    ],
)
def test_a_setting_that_is_not_the_checkpoints_is_warned_of_with_both_values(caplog, now, train_batch_size, changed):
    report_changes(settings(**now), TrainerState(**SAVED), train_batch_size)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().splitlines()[1:] == [f"\t{line} (from trainer_state.json)" for line in changed]


@pytest.mark.parametrize("now", [{}, {"eval_steps": None}, {"logging_steps": 0.1, "save_steps": 0.3}])
def test_unchanged_settings_are_not_mentioned(caplog, now):
    caplog.set_level(logging.DEBUG)
    report_changes(settings(**now), TrainerState(**SAVED), 4)
    assert caplog.records == []


class Patience(TrainerCallback, ExportableState):
    def __init__(self, limit=3):
        self.limit, self.waited = limit, 0

    def state(self):
        return {"args": {"limit": self.limit}, "attributes": {"waited": self.waited}}


class Other(TrainerCallback):
    pass


def handler_of(*callbacks):
    return CallbackHandler(list(callbacks), None, None, None, None)


@pytest.mark.parametrize("replace", [False, True])
def test_callbacks_get_back_what_they_counted_and_their_arguments_only_when_asked(replace):
    before = handler_of(Patience(5), Other(), Patience(6))
    before.callbacks[0].waited, before.callbacks[2].waited = 1, 2
    saved = json.loads(json.dumps(exported_callbacks(before, TrainerControl(should_save=True))))
    assert saved.keys() == {"Patience", "TrainerControl"} and saved["TrainerControl"]["args"]["should_save"]
    after = handler_of(Patience(), Other(), Patience(), Patience())
    restore_callbacks(after, saved, replace=replace)
    found = [(c.limit, c.waited) for c in after.callbacks if isinstance(c, Patience)]
    assert found == ([(5, 1), (6, 2), (3, 0)] if replace else [(3, 1), (3, 2), (3, 0)])


@pytest.mark.parametrize("replace", [False, True])
def test_an_attribute_that_a_callback_does_not_call_its_state_is_never_set_from_a_file(replace):
    saved = {"Patience": {"args": {"limit": 5}, "attributes": {"waited": 2, "on_step_end": "text", "folder": "/"}}}
    handler = handler_of(Patience())
    restore_callbacks(handler, saved, replace=replace)
    assert vars(handler.callbacks[0]) == {"limit": 5 if replace else 3, "waited": 2}


def test_a_replaced_callback_hears_the_events():
    class Hearing(Patience):
        def on_step_end(self, args, state, control, **kwargs):
            heard.append(self.limit)

    heard = []
    handler = handler_of(Hearing(1))
    restore_callbacks(handler, {"Hearing": Hearing(7).state()}, replace=True)
    handler.on_step_end(None, TrainerState(), TrainerControl())
    assert heard == [7]


@pytest.mark.parametrize(
    ("present", "lost"),
    [([], "Patience"), ([Patience()], "Patience (1 of 2)"), ([Other()], "Patience"), ([Patience(), Patience()], None)],
)
def test_a_state_in_the_checkpoint_whose_callback_is_missing_is_warned_of(caplog, present, lost):
    saved = exported_callbacks(handler_of(Patience(), Patience()), TrainerControl())
    handler = handler_of(*present)
    caplog.clear()
    restore_callbacks(handler, saved, replace=False)
    found = [record.getMessage() for record in caplog.records if "does not have" in record.getMessage()]
    assert [text.split(": ")[1].split(". Unless")[0] for text in found] == ([lost] if lost else [])


def test_a_checkpoint_of_a_release_that_knew_less_is_read_as_it_is(tmp_path):
    window, again = window_with(0.5), LossWindow(True)
    window.num_without = 2
    older = loop_state.initial(2, 24, last_logged_step=6) | {"total_loss": 7.5, "window": window.state()}
    (tmp_path / "loop_state.json").write_text(json.dumps(older))
    assert read(tmp_path, again) == older
    assert again.state() == window.state()


def test_of_other_processes_only_what_differs_is_saved():
    own = {"epoch_start_generators": None, "collator_generator": None, "window": window_with(0.5).state()}
    other = own | {"window": window_with(0.25, 1.0).state()}
    gathered = []
    saved = loop_state.of_all_processes(own, lambda mine: gathered.append(mine) or [mine, other, mine])
    assert gathered == [own]
    assert saved["processes"] == [{}, {"window": other["window"]}, {}]
    assert saved["window"] == own["window"]
    assert loop_state.of_all_processes(own, lambda mine: [mine]) == own


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (plan(6, 22), {"gradient_accumulation_steps": 2, "planned_together": 1, "micro_batches_per_epoch": 6}),
        (plan(None, None), {"gradient_accumulation_steps": 2, "planned_together": 1, "micro_batches_per_epoch": None}),
    ],
)
def test_what_decides_the_number_of_micro_batches_is_named(found, expected):
    assert batching_of(found, accumulation=2) == {"samples_per_micro_batch": 4, **expected}
    together = batching_of(found, accumulation=2, strategy="batch_rebalance")
    assert together == {"samples_per_micro_batch": 4, **expected, "planned_together": 2}


def test_the_start_of_an_epoch_has_no_micro_batch_before_it_whatever_was_counted():
    found = plan(6, 22)
    now = batching_of(found)
    assert micro_batches_done(loop_state.initial() | {"micro_batches": 2, "batching": now}, now, found) == 0
    assert done(40, found) == 6  # more samples than the data has now: nothing is left
    assert done(0, plan(6, 60)) == 0  # batches of unequal size, of which 15 would be left
    one_by_one = batching(1, found, types.SimpleNamespace(gradient_accumulation_steps=1, train_sampling_strategy=""))
    assert micro_batches_done(loop_state.initial(0, 1), one_by_one, plan(6, 60)) == 0


def test_a_last_batch_that_is_not_full_is_left_unless_the_loader_drops_it():
    assert done(2, plan(6, 24)) == 0  # 22 samples: five batches and a half
    assert done(2, plan(6, 25)) == 6 - 5  # of 25 samples the last is dropped, so of 23 five batches are left


def test_a_run_that_has_made_all_its_updates_needs_no_further_epoch():
    found = plan(10, 40, accumulation=2, max_steps=12)  # 5 updates an epoch
    assert (
        plan_from_here(found, 4, 0, 12, 2).num_train_epochs == plan_from_here(found, 4, 0, 15, 2).num_train_epochs == 4
    )


def test_a_state_is_read_with_the_place_of_its_best_checkpoint(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        folder.mkdir()
    checkpoint = elsewhere / "checkpoint-8"
    checkpoint.mkdir()
    (elsewhere / "checkpoint-4").mkdir()
    TrainerState(global_step=8, best_model_checkpoint="moved/checkpoint-4").save_to_json(
        checkpoint / "trainer_state.json"
    )
    state = read_state(str(checkpoint), str(run))
    assert state.global_step == 8
    assert state.best_model_checkpoint == str(elsewhere / "checkpoint-4")
    assert state.places_of_checkpoints == (str(run), str(elsewhere))
    (elsewhere / "checkpoint-4").rename(run / "checkpoint-4")
    assert read_state(str(checkpoint), str(run)).best_model_checkpoint == str(run / "checkpoint-4")


def test_the_places_of_checkpoints_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-8").mkdir()
    TrainerState(global_step=8).save_to_json(tmp_path / "checkpoint-8" / "trainer_state.json")
    monkeypatch.chdir(tmp_path)
    assert read_state("checkpoint-8", "run").places_of_checkpoints == ("run", str(tmp_path))


def test_a_run_that_starts_anew_over_another_one_is_warned_with_its_last_checkpoint(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    warn_of_another_run(str(tmp_path / "absent"))
    warn_of_another_run(str(tmp_path))
    assert caplog.records == []
    for number in (2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    warn_of_another_run(str(tmp_path))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path} holds checkpoints of another one (up to checkpoint-10)" in record.getMessage()


@pytest.mark.parametrize(
    ("step", "found", "said"),
    [
        (8, plan(10, 40, epochs=3), "Resumed from checkpoint-8: step 8 of 30, 16 samples into epoch 2."),
        (30, plan(10, 40, epochs=3), "saved at step 30, and with num_train_epochs=3 this run ends at step 30."),
        (12, plan(10, 40, max_steps=9), "saved at step 12, and with max_steps=9 this run ends at step 9."),
        (30, plan(10, 40, epochs=3), "To train further, raise num_train_epochs;"),
        (12, plan(10, 40, max_steps=9), "To train further, raise max_steps;"),
    ],
)
@pytest.mark.parametrize("end", ["", "/"])
def test_where_a_run_goes_on_is_said(caplog, step, found, said, end):
    args = types.SimpleNamespace(num_train_epochs=3, max_steps=found.max_steps)
    position = {"epoch": 2, "samples_in_epoch": 16}
    say_where(f"out/checkpoint-8{end}", position, TrainerState(global_step=step), found, args)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and said in record.getMessage()


def test_settings_without_a_run_to_compare_with_are_not_mentioned(caplog):
    state = TrainerState(logging_steps=10, eval_steps=20, save_steps=30)  # no length, no batch size: another engine's
    report_changes(settings(logging_steps=0.5), state, 4)
    assert caplog.records == []
    report_changes(settings(logging_steps=1), state, 4)
    assert "logging_steps: 1 (from args) != 10" in caplog.text
    caplog.clear()
    report_changes(settings(logging_steps=0.5), TrainerState(max_steps=1, logging_steps=3), 4)
    assert "logging_steps: 1 (from args) != 3" in caplog.text


def test_whole_numbers_are_shown_without_a_fraction_and_others_with_one(caplog):
    state = TrainerState(**SAVED | {"train_batch_size": 5})
    report_changes(settings(n_gpu=2), state, 4)
    assert "per_device_train_batch_size: 2 (from args) != 2.5 " in caplog.text


def test_a_process_that_is_not_the_first_verifies_what_the_first_found(make_trainer, tmp_path, monkeypatch):
    from trainwright.parallel import broadcast

    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    found = tmp_path / "out" / "checkpoint-1"
    monkeypatch.setattr(broadcast, "share", lambda pair: (str(found), None))
    assert find_checkpoint(True, str(tmp_path), False) == str(found)
    (found / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-1"):
        find_checkpoint(True, str(tmp_path), False)
    error = OSError("of the first process")
    monkeypatch.setattr(broadcast, "share", lambda pair: (None, error))
    with pytest.raises(OSError, match="of the first process"):
        find_checkpoint("auto", str(tmp_path), False)


def test_auto_never_starts_anew_where_checkpoints_are_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoint"):
        find_checkpoint("auto", str(tmp_path / "out"), True)


class Bare(TrainerCallback, ExportableState):
    def __init__(self, limit=3):
        self.limit, self.waited = limit, 0

    def state(self):
        return {"args": {"limit": self.limit}}


@pytest.mark.parametrize("replace", [False, True])
def test_a_callback_gets_back_what_the_checkpoint_and_its_state_have_of_it(replace, caplog):
    saved = {
        "Patience": {"args": {"limit": 5}},
        "Bare": {"args": {"limit": 6}, "attributes": {"waited": 2}},
        "Other": {"args": {}, "attributes": {}},
    }
    handler = handler_of(Other(), Patience(), Patience(), TrainerControlLike(), Bare())
    restore_callbacks(handler, saved, replace=replace)
    found = [vars(callback) for callback in handler.callbacks]
    assert found[1:] == [
        {"limit": 5 if replace else 3, "waited": 0},
        {"limit": 3, "waited": 0},
        {},
        {"limit": 6 if replace else 3, "waited": 0},  # `waited` is not part of its state
    ]
    assert "does not have: Other." in caplog.text


class TrainerControlLike(TrainerCallback, ExportableState):
    """An exportable callback of which the checkpoint knows nothing."""

    def state(self):
        return {"args": {}, "attributes": {}}


@pytest.mark.parametrize(("present", "lost"), [([Patience()], False), ([], True)])
def test_one_state_of_a_class_is_one(caplog, present, lost):
    saved = exported_callbacks(handler_of(Patience()), TrainerControl())
    restore_callbacks(handler_of(*present), saved, replace=False)
    assert ("does not have: Patience." in caplog.text) is lost


@pytest.mark.parametrize(
    ("save_strategy", "is_main_process", "is_warned"),
    [("steps", True, True), ("no", True, False), ("steps", False, False)],
)
def test_a_run_that_saves_nothing_or_is_not_the_first_process_does_not_warn_of_another(
    tmp_path, caplog, save_strategy, is_main_process, is_warned
):
    (tmp_path / "checkpoint-2").mkdir()
    args = types.SimpleNamespace(save_strategy=save_strategy, train_batch_size=4, auto_find_batch_size=True)
    run, loaded = types.SimpleNamespace(args=args, restarted_jobs=lambda: ()), []
    place = str(tmp_path)
    assert restore_weights(run, None, place, place, loaded.append, is_main_process=is_main_process) is None
    assert loaded == [] and run.found_size.asked == 4 and bool(caplog.records) is is_warned


def test_a_resumed_run_loads_its_weights_and_the_batch_size_that_fitted(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    sizes = {"asked": 4, "micro_batch": 4, "at_once": [3, 1]}
    path = tmp_path / "out" / "checkpoint-1" / "loop_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": sizes}))
    accept(checkpoint)
    args = types.SimpleNamespace(save_strategy="steps", train_batch_size=4, auto_find_batch_size=True)
    run, loaded = types.SimpleNamespace(args=args, restarted_jobs=lambda: ()), []
    out = str(tmp_path / "out")
    assert restore_weights(run, checkpoint, out, out, loaded.append, is_main_process=True) == checkpoint
    assert loaded == [checkpoint] and run.found_size.at_once == (3, 1)


def test_a_fresh_state_has_the_callbacks_and_a_resumed_one_is_looked_for_in_the_run_s_directory(tmp_path):
    handler, control = handler_of(Patience(5)), TrainerControl(should_save=True)
    state = initial_state(None, "out", handler, control)
    assert state.stateful_callbacks == exported_callbacks(handler, control)
    assert state.places_of_checkpoints == ("out",)
    TrainerState(global_step=3).save_to_json(tmp_path / "trainer_state.json")
    state = initial_state(str(tmp_path), "out", handler, control)
    assert state.global_step == 3 and state.places_of_checkpoints == ("out", str(tmp_path.parent))


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-3"])
def test_an_optimizer_is_restored_by_its_hooks_and_then_the_average_of_the_step(monkeypatch, checkpoint):
    loaded, begun = [], []
    monkeypatch.setattr(averaging, "begin_average", lambda *values: begun.append(values) or "average")
    args, model, optimizer = types.SimpleNamespace(ema_decay=None), object(), object()
    assert restore_optimizer(checkpoint, args, model, optimizer, 3, loaded.append, loaded.append) is None
    assert loaded == [checkpoint] * (2 if checkpoint else 0) and begun == []
    args.ema_decay = 0.5
    assert restore_optimizer(checkpoint, args, model, optimizer, 3) == "average"
    assert begun == [(args, model, optimizer, checkpoint, 3)]
