"""What cannot work is said before any work is done: the argument, its value, what is allowed, and the cure."""

import shutil

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainingArguments


def arguments(tmp_path, **values):
    return TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, **values)


class Never(nn.Module):
    """A model whose forward must not be reached."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        raise AssertionError("the model ran although the input was bad")


# ----------------------------------------------------------------------------------------------------------- data ----


def test_training_without_data_names_the_argument(make_trainer):
    with pytest.raises(ValueError, match=r"train_dataset"):
        make_trainer(trainer={"train_dataset": None}).train()


def test_evaluating_without_data_names_the_argument(make_trainer):
    with pytest.raises(ValueError, match=r"eval_dataset"):
        make_trainer(trainer={"eval_dataset": None}).evaluate()


def test_an_unknown_name_of_an_evaluation_set_lists_those_there_are(make_trainer, line_data):
    trainer = make_trainer(trainer={"eval_dataset": {"valid": line_data(3), "dev": line_data(3)}})
    with pytest.raises((ValueError, KeyError), match=r"vald.*valid"):
        trainer.evaluate("vald")


def test_an_empty_training_set_is_found_at_construction(make_trainer):
    with pytest.raises(ValueError, match=r"train_dataset is empty"):
        make_trainer(trainer={"train_dataset": []})


def test_an_empty_evaluation_set_is_an_error_and_not_a_nan(make_trainer):
    with pytest.raises(ValueError, match=r"eval_dataset|evaluation"):
        make_trainer(trainer={"eval_dataset": []}).evaluate()


def test_dropping_the_only_batch_says_which_argument_did_it(make_trainer, line_data):
    with pytest.raises(ValueError, match=r"dataloader_drop_last"):
        make_trainer(trainer={"train_dataset": line_data(3)}, dataloader_drop_last=True).train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.ones(3), "labels": torch.ones(1)}] * 8)


def test_a_stream_without_length_needs_max_steps(make_trainer):
    with pytest.raises(ValueError, match=r"num_train_epochs=3.*max_steps"):
        make_trainer(trainer={"model": Never(), "train_dataset": Stream()})


def test_a_stream_cannot_be_grouped_by_length(make_trainer):
    with pytest.raises(ValueError, match=r"group_by_length.*no length"):
        make_trainer(trainer={"train_dataset": Stream()}, max_steps=2, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize(
    "wrapped, says",
    [
        (lambda data: {"train": data}, r"keys \['train'\].*dataset\['train'\]"),
        (lambda data: torch.utils.data.DataLoader(data), r"DataLoader.*get_train_dataloader"),
        (lambda data: (data[index] for index in range(4)), r"generator.*IterableDataset"),
    ],
    ids=["sets by name", "a loader", "a generator"],
)
def test_something_that_only_looks_like_a_data_set_says_what_to_pass(make_trainer, line_data, wrapped, says):
    with pytest.raises(TypeError, match=says):
        make_trainer(trainer={"model": Never(), "train_dataset": wrapped(line_data())}, max_steps=1).train()


def test_nothing_left_of_a_plain_dict_lists_the_columns_and_the_nearest(make_trainer):
    rows = [{"X": torch.ones(3), "Labels": torch.ones(1)}] * 4
    with pytest.raises(ValueError, match=r"'X', 'Labels'.*'x', 'labels'.*remove_unused_columns=False"):
        make_trainer(trainer={"model": Never(), "train_dataset": rows}).train()


@pytest.mark.parametrize("returned", [None, 0.5])
def test_a_loss_that_is_no_tensor_is_shown(make_trainer, returned):
    class Returns(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return returned

    with pytest.raises(TypeError, match=rf"compute_loss must return the loss, a tensor .* returned {returned}\."):
        make_trainer(cls=Returns, max_steps=1).train()


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (torch.tensor(1.0), r"must return \(loss, outputs\).* but it returned a Tensor\. End it with: return "),
        ((0.5, {}), r"must return the loss, a tensor .* returned 0\.5\."),
    ],
)
def test_what_a_loss_must_return_in_an_evaluation_is_said(make_trainer, returned, says):
    class Returns(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return returned

    with pytest.raises(TypeError, match=f"compute_loss {says}"):
        make_trainer(cls=Returns).evaluate()


def test_labels_alone_are_nothing_to_train_on(make_trainer):
    rows = [{"text": "a", "labels": torch.zeros(1)}] * 4
    with pytest.raises(ValueError, match=r"nothing but labels would be left.*Columns: \['text', 'labels'\].*'x'"):
        make_trainer(trainer={"train_dataset": rows}, max_steps=1).train()


def test_nothing_left_of_a_datasets_dataset_lists_the_columns(make_trainer):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "lables": [1, 2]})
    with pytest.raises(ValueError, match=r"'text', 'lables'.*labels.*remove_unused_columns=False"):
        make_trainer(trainer={"model": Never(), "train_dataset": table}).train()


# ---------------------------------------------------------------------------------------------------------- model ----


class NoLoss(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.linear, self.returned = nn.Linear(3, 1), returned

    def forward(self, x, labels=None):
        return self.returned(self.linear(x))


@pytest.mark.parametrize(
    "returned, says",
    [(lambda out: {"logits": out}, r"\['logits'\]"), (lambda out: out, "Tensor"), (lambda out: (), "tuple")],
    ids=["a dict without loss", "predictions", "an empty tuple"],
)
def test_a_model_that_returns_no_loss_says_what_it_returned_and_got(make_trainer, returned, says):
    with pytest.raises(ValueError, match=rf"no loss.*{says}.*\['x', 'labels'\].*compute_loss"):
        make_trainer(trainer={"model": NoLoss(returned)}).train()


def test_a_first_element_that_is_no_scalar_is_not_taken_for_a_loss(make_trainer):
    with pytest.raises(ValueError, match=r"loss.*scalar|scalar.*loss|loss.*\(4, 1\)"):
        make_trainer(trainer={"model": NoLoss(lambda out: (out, out))}).train()


def test_a_class_in_place_of_a_model_says_to_call_it(make_trainer):
    with pytest.raises(TypeError, match=r"model=.*Never.*Call it"):
        make_trainer(trainer={"model": Never})


def test_something_else_in_place_of_a_model_names_its_type(make_trainer):
    with pytest.raises(TypeError, match=r"model=.*Module.*str"):
        make_trainer(trainer={"model": "gpt2"})


def test_no_model_at_all_names_both_arguments(tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=r"model=.*model_init="):
        Trainer(args=arguments(tmp_path))


def test_both_model_and_model_init_name_the_choice(tmp_path):
    with pytest.raises(ValueError, match=r"both model= and model_init="):
        Trainer(Never(), arguments(tmp_path), model_init=Never)


@pytest.mark.parametrize("init, says", [(lambda: None, "None"), (lambda a, b: Never(), "2"), ("gpt2", "gpt2")])
def test_a_model_init_that_cannot_work_says_why(tmp_path, init, says):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=rf"model_init.*{says}"):
        Trainer(args=arguments(tmp_path), model_init=init)


def test_a_bare_encoder_says_that_it_has_no_head(make_trainer):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=16
    )
    with pytest.raises(ValueError, match=r"BertModel.*no loss.*head"):
        make_trainer(trainer={"model": transformers.AutoModel.from_config(config)})


def test_optimizers_do_not_go_with_model_init(tmp_path):
    optimizer = torch.optim.SGD(Never().parameters(), lr=0.1)
    with pytest.raises((ValueError, RuntimeError), match=r"optimizers=.*model_init="):
        Trainer(args=arguments(tmp_path), model_init=Never, optimizers=(optimizer, None))


def test_an_optimizer_that_is_no_pair_with_a_schedule_says_how_to_write_it(make_trainer, line_model):
    model = line_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, got in ((optimizer, "SGD"), ((optimizer,), "tuple of 1")):
        with pytest.raises(TypeError, match=rf"takes a pair.*got a {got}\..*optimizers=\(optimizer, None\)"):
            make_trainer(trainer={"model": model, "optimizers": given})
    assert make_trainer(trainer={"model": model, "optimizers": [optimizer, None]}).optimizer is optimizer


def test_predicting_without_data_says_what_a_data_set_is(make_trainer):
    with pytest.raises(TypeError, match=r"The data set is a NoneType.*Pass a list"):
        make_trainer().predict(None)


def test_two_ways_to_choose_an_optimizer_are_one_too_many(make_trainer, line_model):
    model = line_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"both optimizers= and optimizer_cls_and_kwargs="):
        make_trainer(
            trainer={
                "model": model,
                "optimizers": (optimizer, None),
                "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
            }
        )


def test_an_optimizer_of_another_model_is_not_stepped_in_vain(make_trainer, line_model):
    optimizer = torch.optim.SGD(line_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer"):
        make_trainer(trainer={"optimizers": (optimizer, None)}, max_steps=1).train()


def test_a_loss_function_that_returns_no_scalar_shows_the_shape(make_trainer):
    def per_sample(outputs, labels):
        return (outputs["logits"] - labels).pow(2)

    with pytest.raises(ValueError, match=r"loss.*\(4, 1\)"):
        make_trainer(trainer={"compute_loss_func": per_sample}, max_steps=1).train()


def test_a_frozen_model_has_nothing_to_train(make_trainer, line_model):
    model = line_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad|trainable|frozen"):
        make_trainer(trainer={"model": model}).train()


def test_a_model_without_blocks_to_checkpoint_is_named(make_trainer):
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True.*LineModel"):
        make_trainer(gradient_checkpointing=True).train()


# ------------------------------------------------------------------------------------------------------ arguments ----


def test_args_of_another_type_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"args must be a TrainingArguments, not str"):
        Trainer(Never(), str(tmp_path))


@pytest.mark.parametrize("name, nearest", [("train_datset", "train_dataset"), ("processing_clas", "processing_class")])
def test_a_misspelt_argument_of_the_trainer_suggests_the_nearest(tmp_path, name, nearest):
    with pytest.raises(TypeError, match=rf"'{name}'.*{nearest}"):
        Trainer(Never(), arguments(tmp_path), **{name: None})


def test_a_misspelt_argument_of_train_suggests_the_nearest(make_trainer):
    with pytest.raises(TypeError, match=r"'resume_from_chekpoint'.*resume_from_checkpoint"):
        make_trainer().train(resume_from_chekpoint=True)


@pytest.mark.parametrize(
    "name, value, nearest",
    [
        ("learning_rat", 0.1, "learning_rate"),
        ("per_device_train_batchsize", 4, "per_device_train_batch_size"),
        ("eval_stratgy", "no", "eval_strategy"),
    ],
)
def test_a_misspelt_argument_of_the_arguments_suggests_the_nearest(tmp_path, name, value, nearest):
    with pytest.raises(TypeError, match=rf"{name}.*{nearest}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("eval_strategy", "step", "steps"),
        ("save_strategy", "epochs", "epoch"),
        ("logging_strategy", "never", "no"),
        ("optim", "adamw_troch", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("hub_strategy", "everysave", "every_save"),
        ("train_sampling_strategy", "group_by_len", "group_by_length"),
        ("log_level", "verbose", "info"),
        ("label_smoothing_factor", 1.5, "1"),
        ("gradient_accumulation_steps", 0, "1"),
        ("learning_rate", -1.0, "0"),
        ("logging_steps", 0, "0"),
        ("save_steps", 1.5, "whole"),
        ("num_train_epochs", "many", "number"),
        ("max_grad_norm", float("nan"), "0"),
    ],
)
def test_a_value_that_is_not_allowed_is_shown_with_what_is(tmp_path, name, value, allowed):
    with pytest.raises((ValueError, TypeError), match=rf"(?s){name}.*{allowed}") as caught:
        arguments(tmp_path, **{name: value})
    assert str(value) in str(caught.value)


def test_an_unknown_tracker_lists_the_known_and_the_nearest(tmp_path, line_model):
    with pytest.raises((ValueError, ImportError), match=r"tensorbord.*tensorboard"):
        Trainer(line_model(), TrainingArguments(str(tmp_path), report_to="tensorbord", use_cpu=True))


def test_a_tracker_that_is_not_installed_names_the_command_that_installs_it(tmp_path, line_model):
    import importlib.util

    if importlib.util.find_spec("clearml") is not None:
        pytest.skip("clearml is installed")
    with pytest.raises(ImportError, match=r"clearml.*pip install"):
        Trainer(line_model(), TrainingArguments(str(tmp_path), report_to="clearml", use_cpu=True))


def test_an_evaluation_strategy_without_data_names_both(make_trainer):
    with pytest.raises(ValueError, match=r"eval_strategy='steps'.*eval_dataset"):
        make_trainer(trainer={"model": Never(), "eval_dataset": None}, eval_strategy="steps")


def test_the_best_model_needs_evaluations_and_checkpoints_at_the_same_steps(tmp_path):
    with pytest.raises(ValueError, match=r"load_best_model_at_end.*(save|eval)_strategy.*(save|eval)_strategy"):
        arguments(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="steps")


def test_batch_metrics_need_a_function_that_takes_compute_result(make_trainer):
    with pytest.raises(ValueError, match=r"batch_eval_metrics=True.*compute_result"):
        make_trainer(trainer={"compute_metrics": lambda prediction: {}}, batch_eval_metrics=True)


def test_a_callback_that_is_none_is_named(make_trainer):
    with pytest.raises(TypeError, match=r"callbacks.*TrainerCallback"):
        make_trainer(trainer={"callbacks": [print]})


# ------------------------------------------------------------------------------------------------ the best metric ----


BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


def test_a_metric_no_evaluation_can_return_is_found_before_the_model_runs(make_trainer):
    trainer = make_trainer(trainer={"model": Never()}, metric_for_best_model="accuracy", **BEST)
    with pytest.raises(ValueError, match=r"metric_for_best_model='accuracy'.*eval_loss.*compute_metrics"):
        trainer.train()


def test_a_metric_that_compute_metrics_does_not_return_is_found_before_the_first_step(make_trainer):
    def compute_metrics(prediction):
        return {"accuracy": 1.0}

    trainer = make_trainer(trainer={"compute_metrics": compute_metrics}, metric_for_best_model="acuracy", **BEST)
    with pytest.raises(ValueError, match=r"metric_for_best_model='acuracy'.*eval_accuracy"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_with_several_evaluation_sets_the_metric_must_say_which(make_trainer, line_data):
    sets = {"easy": line_data(3), "hard": line_data(3)}
    with pytest.raises(ValueError, match=r"metric_for_best_model='loss'.*easy.*hard.*eval_easy_loss"):
        make_trainer(trainer={"eval_dataset": sets}, metric_for_best_model="loss", **BEST).train()


# ---------------------------------------------------------------------------------------------------- checkpoints ----


def test_resuming_where_there_is_no_checkpoint_says_so(make_trainer):
    with pytest.raises(ValueError, match=r"no checkpoint in .*out"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_path_that_does_not_exist_is_named(make_trainer, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere.*(exist|director)"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_directory_that_is_no_checkpoint_says_what_it_lacks(make_trainer, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.txt").write_text("miau")
    with pytest.raises(ValueError, match=r"pictures.*trainer_state\.json is missing"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "pictures"))


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    return tmp_path / "out" / "checkpoint-2"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_file_of_a_named_checkpoint_is_named_with_the_good_neighbour(make_trainer, checkpoint, name, harm):
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flipped" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be used: .*{name}.*checkpoint-1"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_model_names_what_does_not_fit(make_trainer, checkpoint, line_model):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            return {"loss": self.other(x).mean()}

    with pytest.raises((ValueError, RuntimeError), match=r"linear\.weight|other\.weight|optimizer"):
        make_trainer(trainer={"model": Other()}, max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_with_another_optimizer_says_so(make_trainer, checkpoint):
    """Adam's state in SGD would be accepted by torch and fail, or worse, at the first step."""
    with pytest.raises(ValueError, match=r"optim"):
        make_trainer(max_steps=4, optim="sgd").train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_optimizer_says_what_resuming_would_cost(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_only_model=True).train()
    with pytest.raises((FileNotFoundError, ValueError), match=r"save_only_model"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=True)


def test_when_all_checkpoints_are_damaged_each_is_named(make_trainer, checkpoint):
    for number in (1, 2):
        (checkpoint.parent / f"checkpoint-{number}" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)damaged.*checkpoint-2: .*checkpoint-1: "):
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)


# -------------------------------------------------------------------------------------------------------- outputs ----


def test_an_output_directory_that_is_a_file_is_named(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir=.*file.*directory"):
        make_trainer(output_dir=str(tmp_path / "file"))


def test_an_output_directory_under_a_file_is_named(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir=.*below.*directory"):
        make_trainer(output_dir=str(tmp_path / "file" / "below"))


def test_the_search_without_model_init_says_what_to_pass(make_trainer):
    with pytest.raises(RuntimeError, match=r"model_init"):
        make_trainer().hyperparameter_search()


def test_a_best_checkpoint_that_is_gone_leaves_the_last_weights_and_warns(make_trainer, tmp_path, caplog):
    class Losing(Trainer):
        def _load_best_model(self):
            shutil.rmtree(self.state.best_model_checkpoint)
            super()._load_best_model()

    options = {**BEST, "num_train_epochs": 1}
    make_trainer(cls=Losing, **options).train()
    assert "best checkpoint" in caplog.text and "gone" in caplog.text


# -------------------------------------------------------------------------------------- values of the wrong kind ----


@pytest.mark.parametrize(
    "given, says",
    [
        ({"optimizers": (torch.optim.SGD, None)}, r"optimizers=.*class SGD.*optimizer_cls_and_kwargs"),
        ({"callbacks": object()}, r"callbacks=.*list.*object"),
        ({"compute_metrics": 5}, r"compute_metrics=.*function.*int.*5"),
        ({"compute_loss_func": "mse"}, r"compute_loss_func=.*function.*'mse'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_is_wanted(make_trainer, given, says):
    with pytest.raises(TypeError, match=says):
        make_trainer(trainer=given)


def test_a_checkpoint_that_is_no_path_is_named(make_trainer):
    with pytest.raises(TypeError, match=r"resume_from_checkpoint=5.*directory"):
        make_trainer().train(resume_from_checkpoint=5)


def test_a_misspelt_label_name_suggests_the_argument_of_forward(make_trainer):
    with pytest.raises(ValueError, match=r"lables.*Did you mean 'labels'"):
        make_trainer(label_names=["lables"])


def test_a_class_of_transformers_that_is_given_our_arguments_says_to_take_the_trainer_too(tmp_path):
    """`transformers.Trainer` reads arguments that ours lack; the first depends on its release."""
    args = arguments(tmp_path)
    reads = {"__name__": "transformers.trainer", "args": args}
    with pytest.raises(AttributeError, match="from trainwright import Trainer, TrainingArguments"):
        exec("args.fsdp_plugin_args", reads)
    assert exec("found = hasattr(args, 'no_such_name')", reads) is None and reads["found"] is False
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'$"):
        _ = args.no_such_name
