"""The schema for editors and the templates: valid by each other, and every option in a template is a real one."""

import dataclasses
import json
import re

import pytest

from trainwright import Seq2SeqTrainingArguments, TrainingArguments
from trainwright.cli import TEMPLATES, build_parser, main
from trainwright.config_file.check import check
from trainwright.config_file.reading import Settings, parse_yaml
from trainwright.config_file.schema import schema
from trainwright.config_file.sections import TASKS
from trainwright.config_file.templates import FOLDER, text_of
from trainwright.tasks.arguments import PretrainingModelArguments

KINDS = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


def problems_of(value, rule, place="file"):
    """What a validator of the part of JSON schema that we write would find."""
    known = {"type", "enum", "const", "properties", "required", "additionalProperties", "items", "allOf", "if", "then"}
    assert rule.keys() <= known | {"description", "default", "deprecated", "title", "$schema"}, rule.keys()
    found = []
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    is_kind = [isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds]
    if kinds and not any(is_kind):
        return [f"{place}: {value!r} is no {kinds}"]
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{place}: {value!r}")
    if "const" in rule and value != rule["const"]:
        found.append(f"{place}: {value!r}")
    if isinstance(value, dict):
        properties = rule.get("properties", {})
        found += [f"{place}.{name} is missing" for name in rule.get("required", ()) if name not in value]
        if rule.get("additionalProperties") is False:
            found += [f"{place}.{name} is unknown" for name in value if name not in properties]
        for name in value.keys() & properties.keys():
            found += problems_of(value[name], properties[name], f"{place}.{name}")
    if isinstance(value, list) and "items" in rule:
        found += [one for item in value for one in problems_of(item, rule["items"], place)]
    for one in rule.get("allOf", ()):
        if not problems_of(value, one["if"]):
            found += problems_of(value, one["then"], place)
    return found


def with_every_option(text):
    """A template whose options that are not set are set, too."""
    return re.sub(r"^((?:  )?)# ((?:  )*[a-z]\w*:(?: .*)?)$", r"\1\2", text, flags=re.MULTILINE)


def takes_adapters(task):
    return not issubclass(TASKS[task].model, PretrainingModelArguments)


def test_each_task_has_a_template_and_the_command_line_knows_it():
    assert sorted(TEMPLATES) == sorted(TASKS) == sorted(path.stem for path in FOLDER.iterdir())
    command = build_parser()._subparsers._group_actions[0].choices["init"]
    assert all(task in command.format_help() for task in TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_template_is_valid_as_it_is_and_all_its_options_are_real(task):
    text = text_of(task, "my.yaml")
    assert text.startswith("# yaml-language-server: $schema=") and "trainwright schema >" in text.splitlines()[1]
    assert "trainwright train my.yaml" in text and f"{task}.yaml" not in text
    values, every = parse_yaml(text), parse_yaml(with_every_option(text))
    assert problems_of(values, schema()) == [] and problems_of(every, schema()) == []
    assert sum(map(len, (every[name] for name in ("model", "data", "training")))) > 1.5 * sum(
        map(len, (values[name] for name in ("model", "data", "training")))
    )
    assert takes_adapters(task) == ("lora" in every) and "model_type" in every["model"]["config"]


@pytest.mark.parametrize("task", TASKS)
def test_a_template_is_a_job_once_its_files_are_there(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = parse_yaml(text_of(task, "my.yaml"))
    every = parse_yaml(with_every_option(text_of(task, "my.yaml")))
    every["data"] = {**every["data"], "validation_split_percentage": 0}
    for name in ("train_file", "validation_file", "test_file"):
        (tmp_path / every["data"][name]).write_text("")
    job = check(Settings("my.yaml", values))
    assert job.task == task and job.training.do_train and job.training.do_eval
    del every["model"]["config"], every["model"]["from_scratch"]
    every["training"].pop("bf16")
    if "task_name" in every["data"]:
        del every["data"]["name"]
    made = check(Settings("my.yaml", every)).model
    assert not takes_adapters(task) or made.lora["r"] == 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"training": {"learning_rat": 1}}, "file.training.learning_rat is unknown"),
        ({"training": {"learning_rate": "fast"}}, "file.training.learning_rate: 'fast' is no ['number']"),
        ({"training": {"eval_strategy": "stps"}}, "file.training.eval_strategy: 'stps'"),
        ({"data": {"name": "x", "objective": "causal"}}, "file.data.objective is unknown"),
        ({"models": {}}, "file.models is unknown"),
        ({"task": "x"}, "file.task: 'x'"),
        ({"task": "speech_pretraining", "lora": {"r": 8}}, "file.lora: {'r': 8} is no ['null']"),
    ],
)
def test_the_schema_refuses_what_is_refused(change, expected):
    good = {"task": "text_classification", "model": {"path": "x"}, "data": {"name": "y"}, "training": {"max_steps": 1}}
    assert problems_of(good, schema()) == []
    assert problems_of({**good, **change}, schema()) == [expected]


def test_the_schema_has_every_argument_with_its_help_and_default():
    sections = {rule["if"]["properties"]["task"]["const"]: rule["then"]["properties"] for rule in schema()["allOf"]}
    for task, cls in (("language_modeling", TrainingArguments), ("sequence_to_sequence", Seq2SeqTrainingArguments)):
        found = sections[task]["training"]["properties"]
        for field in dataclasses.fields(cls):
            if field.init:
                assert found[field.name]["description"], field.name
    assert sections["language_modeling"]["training"]["properties"]["learning_rate"]["default"] == 5e-5
    assert "objective" in sections["language_modeling"]["data"]["properties"]
    assert sections["language_modeling"]["model"]["properties"]["path"]["type"] == "string"


def test_the_command_prints_the_schema(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema()))


def test_init_writes_a_template_and_overwrites_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "language_modeling"]) == 0
    assert (tmp_path / "language_modeling.yaml").read_text() == text_of("language_modeling", "language_modeling.yaml")
    assert capsys.readouterr().out == (
        "language_modeling.yaml was written. Edit it, then: trainwright train language_modeling.yaml\n"
    )
    assert main(["init", "text_classification", "language_modeling.yaml"]) == 1
    assert capsys.readouterr().err == (
        "trainwright init: language_modeling.yaml is there already, and was not changed. --force overwrites it. "
        "(--traceback shows where)\n"
    )
    assert main(["init", "text_classification", "language_modeling.yaml", "--force"]) == 0
    assert "task: text_classification" in (tmp_path / "language_modeling.yaml").read_text()


def test_init_of_a_misspelt_task_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["init", "text_clasification"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "trainwright init: error: argument TASK: 'text_clasification' is no task. Did you mean 'text_classification'?"
    )


def test_the_warmup_of_a_template_is_shorter_than_any_run():
    for task in TEMPLATES:
        training = parse_yaml(text_of(task, "file.yaml"))["training"]
        assert TASKS[task].training(**training, use_cpu=True).get_warmup_steps(20) == 2, task


def test_init_of_what_trains_nothing_names_the_script_that_does_it(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["init", "text_generation"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "trainwright init: error: argument TASK: text_generation trains nothing: a trained model generates texts. "
        "See: python examples/text_generation.py --help"
    )
