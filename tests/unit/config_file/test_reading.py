"""A file and the words that override it, as nested values: YAML 1.2, JSON, dotted names, mistakes."""

import json

import pytest

from trainwright.config_file.reading import COMMAND_LINE, ConfigFileError, parse_yaml, read


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("task: x\ntraining:\n  learning_rate: 1e-4\n  eval_strategy: no\n")
    return "a.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("2.5", 2.5), (".5", 0.5), ("-3", -3), ("010", "010"), ("true", True), ("False", False),
        ("no", "no"), ("on", "on"), ("off", "off"), ("null", None), ("~", None), ("2026-11-30", "2026-11-30"),
        ("[a, 1]", ["a", 1]), ("{a: 1}", {"a": 1}), ("'1'", "1"), (".inf", float("inf")), ("3.0.0", "3.0.0"),
    ],
)  # fmt: skip
def test_a_scalar_is_what_yaml_1_2_says(text, value):
    found = parse_yaml(text)
    assert (type(found), found) == (type(value), value)


def test_a_file_of_either_kind_holds_the_same(path, tmp_path):
    values = read(path).values
    assert values == {"task": "x", "training": {"learning_rate": 1e-4, "eval_strategy": "no"}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert read("a.json").values == values


def test_an_override_replaces_adds_and_makes_a_section(path):
    words = ["--training.learning_rate", "2e-5", "--training.max-steps=3", "--model.config.n_layer", "2"]
    settings = read(path, [*words, "--training.fp16", "--task", "y", "--lora.target_modules", "[a, b]"])
    assert settings.values == {
        "task": "y",
        "training": {"learning_rate": 2e-5, "eval_strategy": "no", "max_steps": 3, "fp16": True},
        "model": {"config": {"n_layer": 2}},
        "lora": {"target_modules": ["a", "b"]},
    }
    places = {
        name: settings.place(name) for name in ("training.fp16", "training.eval_strategy", "model.config", "task")
    }
    assert places == {
        "training.fp16": COMMAND_LINE,
        "training.eval_strategy": path,
        "model.config": COMMAND_LINE,
        "task": COMMAND_LINE,
    }


def test_a_negative_number_is_a_value_and_not_a_flag(path):
    assert read(path, ["--training.max_steps", "-1"]).values["training"]["max_steps"] == -1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["1e-4"],
            "command line: '1e-4' belongs to no setting. Write --section.option value, such as "
            "--training.learning_rate 1e-4.",
        ),
        (["--training.learning_rate.x", "1"], "command line: --training.learning_rate.x is to set an option of "
         "training.learning_rate=0.0001, no section."),
        (["--training..x", "1"], "command line: --training..x has an empty part. Write --section.option value."),
        (["--training.x", "[1"], "command line: --training.x is not valid YAML: line 1, column 3: "
         "expected ',' or ']', but got '<stream end>'."),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(path, words, message):
    with pytest.raises(ConfigFileError) as raised:
        read(path, words)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.yaml", None, "There is no file b.yaml. Did you mean 'a.yaml'? `trainwright init TASK b.yaml` writes one."),
        ("a.toml", "", "a.toml: a file of settings ends in one of .yaml, .yml, .json."),
        ("b.yaml", "a: 1\na: 2\n", "b.yaml is not valid YAML: line 2, column 1: 'a' is written twice."),
        ("b.yaml", "a: [1\n", "b.yaml is not valid YAML: line 2, column 1: expected ',' or ']', but got "
         "'<stream end>'."),
        ("b.yaml", "- a\n", "b.yaml holds no sections, such as task and model. `trainwright init` writes some."),
        ("b.yaml", "", "b.yaml holds no sections, such as task and model. `trainwright init` writes some."),
        ("b.json", '{"a": 1, "a": 2}', "b.json is not valid JSON: 'a' is written twice."),
        ("b.json", "{", "b.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
         "(char 1)."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(path, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigFileError) as raised:
        read(name)
    assert str(raised.value) == message
