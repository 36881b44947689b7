"""Settings become the arguments of a task; every mistake is a line with its place, and nothing is loaded before."""

import subprocess
import sys

import pytest

from trainwright import Seq2SeqTrainingArguments
from trainwright.config_file.check import check, in_words_of_the_file
from trainwright.config_file.reading import ConfigFileError, Settings, read
from trainwright.config_file.sections import SECTIONS, TASKS

GOOD = {
    "task": "text_classification",
    "model": {"path": "some-model"},
    "data": {"name": "imdb"},
    "training": {"output_dir": "out", "report_to": "none", "use_cpu": True},
}


def settings(**changes):
    """GOOD with options changed, as `training__max_steps=3`, or sections replaced; None removes."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in GOOD.items()}
    for name, value in changes.items():
        section, _, option = name.partition("__")
        if option:
            values.setdefault(section, {})[option] = value
        else:
            values[section] = value
    return Settings("a.yaml", {name: value for name, value in values.items() if value is not None})


def test_the_sections_are_the_arguments_of_the_task():
    job = check(settings(training__learning_rate=1e-4, model__tokenizer="other", data__max_seq_length=32))
    assert (job.task, job.model.model_name_or_path, job.model.tokenizer_name) == (
        "text_classification",
        "some-model",
        "other",
    )
    assert (job.data.dataset_name, job.data.max_seq_length) == ("imdb", 32)
    assert (job.training.learning_rate, job.training.output_dir) == (1e-4, "out")


def test_what_is_not_said_is_done_where_there_are_data_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\n")
    training = check(settings()).training
    assert (training.do_train, training.do_eval, training.do_predict) == (True, False, False)
    assert training.resume_from_checkpoint == "auto"
    files = {"train_file": "a.csv", "validation_file": "a.csv", "test_file": "a.csv"}
    training = check(settings(data=files, training__do_train=False)).training
    assert (training.do_train, training.do_eval, training.do_predict) == (False, True, True)


@pytest.mark.parametrize(("value", "expected"), [(False, "false"), ("auto", "auto"), (None, None)])
def test_a_run_is_started_anew_where_the_file_says_so(value, expected):
    assert check(settings(training__resume_from_checkpoint=value)).training.resume_from_checkpoint == expected


def test_text_to_text_has_the_arguments_that_generate():
    data = {"name": "x", "task": "summarization"}
    job = check(settings(task="sequence_to_sequence", data=data, training__generation_max_length=9))
    assert isinstance(job.training, Seq2SeqTrainingArguments) and job.training.predict_with_generate
    assert job.training.generation_max_length == 9 and job.data.task == "summarization"


def test_an_older_name_of_an_argument_is_translated():
    with pytest.warns(FutureWarning, match="evaluation_strategy"):
        assert check(settings(training__evaluation_strategy="epoch")).training.eval_strategy == "epoch"


TASK_NAMES = ", ".join(TASKS)
MODEL_OPTIONS = (
    "path, config_path, tokenizer, cache_dir, revision, trust_remote_code, from_scratch, ignore_mismatched_sizes, "
    "config"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "text_clasification"},
            "task='text_clasification' is none of " + TASK_NAMES + ". Did you mean 'text_classification'?",
        ),
        ({"task": None}, f"has no task, one of {TASK_NAMES}. `trainwright init` writes an example."),
        (
            {"model": None},
            "has no model, with path (a directory or hub name) or config (the values of a new one). "
            "`trainwright init` writes an example.",
        ),
        (
            {"data": None},
            "has no data, with train_file (csv, tsv, json, jsonl, txt or parquet) or name (of the hub, or a directory)."
            " `trainwright init` writes an example.",
        ),
        (
            {"modle": {"path": "x"}},
            'modle={"path": "x"}: there is no such section; there are '
            + ", ".join(SECTIONS)
            + ". Did you mean 'model'?",
        ),
        (
            {"learning_rate": 1e-4},
            "learning_rate=0.0001: there is no such section; there are "
            + ", ".join(SECTIONS)
            + ". Did you mean 'training.learning_rate'?",
        ),
        ({"training": "out"}, "training='out' is no section of options."),
        (
            {"model__pth": "x"},
            f"model.pth='x': there is no such option of model; there are {MODEL_OPTIONS}. Did you mean 'path'?",
        ),
        ({"model__from_scratch": "maybe"}, "model.from_scratch='maybe' is not allowed: it takes true or false."),
        (
            {"model__config": {"model_type": "gpt2"}},
            "model: model.path='some-model' and "
            "config={'model_type': 'gpt2'}: give one of them, a saved model or the values of a new one.",
        ),
        (
            {"model": {"config": {"n_layer": 2}}},
            "model.config={'n_layer': 2} has no model_type, such as gpt2, llama or bert.",
        ),
        (
            {"model": {"config": {"model_type": "gpt2"}}},
            "model: config needs model.tokenizer, a directory or hub name: a new model has no tokenizer or processor.",
        ),
        (
            {"data__max_train_samples": "many"},
            "data.max_train_samples='many' is not allowed: it takes a whole number or null.",
        ),
        (
            {"data__max_train_samples": 0},
            "data.max_train_samples=0 is not allowed: it must be a finite whole number at least 1 or None.",
        ),
        ({"data__max_seq_length": None}, "data.max_seq_length=null is not allowed: it takes a whole number."),
        ({"data__text_column": ["a"]}, 'data.text_column=["a"] is not allowed: it takes text or null.'),
        ({"data__task_name": "mrcp"}, None),
        (
            {"training__learning_rat": 1},
            "training.learning_rat: TrainingArguments has no argument 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        (
            {"training__learning_rate": -1.0},
            "training.learning_rate=-1.0 is not allowed: it must be a finite number at least 0.",
        ),
        (
            {"training__num_train_epochs": "three"},
            "training.num_train_epochs='three' is not allowed: it takes a number.",
        ),
        (
            {"training__eval_strategy": "stps"},
            "training.eval_strategy: 'stps' is not a valid IntervalStrategy; choose "
            "one of ['no', 'steps', 'epoch']. Did you mean 'steps'?",
        ),
        ({"training__eval_strategy": 3}, "training.eval_strategy=3 is not allowed: it takes no, steps, epoch."),
        ({"training__hub_token": ["hidden"]}, "training.hub_token=(hidden) is not allowed: it takes text or null."),
    ],
)
def test_a_mistake_is_one_line_with_file_option_value_and_what_is_allowed(changes, message):
    with pytest.raises(ConfigFileError) as raised:
        check(settings(**changes))
    if message is None:
        assert str(raised.value).startswith("a.yaml: data.task_name='mrcp' is none of ")
        assert str(raised.value).endswith("Did you mean 'mrpc'?")
    else:
        assert str(raised.value) == ("a.yaml " if message.startswith("has no") else "a.yaml: ") + message


def test_a_file_that_does_not_exist_is_named_by_its_option():
    with pytest.raises(
        ConfigFileError, match=r"^a\.yaml: data\.train_file='absent\.csv' does not exist \(seen from .+\)\.$"
    ):
        check(settings(data={"train_file": "absent.csv"}))


def test_mistakes_are_named_together_each_on_its_line():
    with pytest.raises(ConfigFileError) as raised:
        check(settings(model__from_scratch=3.5, data__max_seq_length="x", training__logging_steps=[]))
    places = [line.partition("=")[0] for line in str(raised.value).splitlines()]
    assert places == ["a.yaml: model.from_scratch", "a.yaml: data.max_seq_length", "a.yaml: training.logging_steps"]


def test_a_mistake_of_the_command_line_is_not_said_to_be_in_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("task: text_classification\nmodel: {path: x}\ndata: {name: y}\n")
    with pytest.raises(ConfigFileError) as raised:
        check(read(str(path), ["--training.learning_rate", "-1.0"]))
    expected = "command line: training.learning_rate=-1.0 is not allowed: it must be a finite number at least 0."
    assert str(raised.value) == expected


def test_options_of_an_adapter_are_those_of_peft():
    pytest.importorskip("peft")
    assert check(settings(lora={"r": 4})).model.lora == {"r": 4}
    assert check(settings(lora={})).model.lora == {}
    with pytest.raises(ConfigFileError) as raised:
        check(settings(lora={"lora_alfa": 4}))
    assert str(raised.value).startswith("a.yaml: lora.lora_alfa=4: there is no such option of lora (peft.LoraConfig); ")
    assert str(raised.value).endswith("Did you mean 'lora_alpha'?")


def test_an_adapter_without_peft_or_of_random_weights_is_one_clear_error(monkeypatch):
    import trainwright.config_file.check as module

    with pytest.raises(ConfigFileError) as raised:
        check(settings(lora={"r": 4}, model__from_scratch=True))
    assert str(raised.value).endswith(
        "lora trains an adapter of saved weights, and this model starts from random ones."
    )
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigFileError) as raised:
        check(settings(lora={"r": 4}))
    expected = "a.yaml: lora: training an adapter needs peft. Run: pip install 'trainwright[peft]'"
    assert str(raised.value) == expected


def test_flags_in_a_message_of_a_task_are_named_as_in_the_file():
    job = check(settings())
    message = "Name it with --text_column, or give --do_train, or --model_name_or_path."
    expected = "Name it with data.text_column, or give training.do_train, or model.path."
    assert in_words_of_the_file(message, job) == expected


def test_mistakes_are_found_without_torch():
    code = (
        "import sys\nfrom trainwright.config_file.check import check\n"
        "from trainwright.config_file.reading import Settings\n"
        f"check(Settings('a.yaml', {GOOD!r}))\nfrom trainwright.config_file.schema import as_text\nas_text()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
