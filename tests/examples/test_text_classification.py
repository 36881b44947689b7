"""Text classification, on tiny local data with real metrics, in this process: what it learns, leaves, and refuses."""

import json
import re

import pytest
from tests.examples.tiny import example, tiny_bert

GOOD, BAD = ["fine", "lovely", "great"], ["awful", "dull", "poor"]


def rows(number):
    """Texts whose words decide the label: nothing but reading them gives it away."""
    for index in range(number):
        word = (GOOD if index % 2 == 0 else BAD)[index % 3]
        yield f"a {word} film {index % 5}", "pos" if index % 2 == 0 else "neg"


def write_csv(path, lines, header="text,label"):
    path.write_text("\n".join([header, *(",".join(map(str, line)) for line in lines)]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def script():
    return example("text_classification")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_bert(tmp_path_factory.mktemp("bert"), [text for text, _ in rows(30)]))


def arguments(model, tmp_path, *more):
    return [
        "--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu",
        "--disable_tqdm", "true", "--learning_rate", "1e-2", "--max_seq_length", "16", *more,
    ]  # fmt: skip


def test_it_learns_words_that_decide_the_label_and_writes_its_predictions(script, model, tmp_path):
    train, valid = write_csv(tmp_path / "train.csv", rows(60)), write_csv(tmp_path / "valid.csv", rows(30))
    test = write_csv(tmp_path / "test.csv", [(text,) for text, _ in rows(10)], header="text")
    metrics = script.main(
        arguments(
            model, tmp_path, "--train_file", train, "--validation_file", valid, "--test_file", test, "--do_train",
            "--do_eval", "--do_predict", "--num_train_epochs", "6",
        )
    )  # fmt: skip
    assert metrics["eval_accuracy"] == 1.0
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t{label}" for index, (_, label) in enumerate(rows(10)))]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"neg": 0, "pos": 1}
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"] == 1.0
    again = script.main(arguments(str(tmp_path / "out"), tmp_path / "again", "--test_file", test, "--do_predict"))
    assert again["predict_samples"] == 10
    assert (tmp_path / "again" / "out" / "predictions.tsv").read_text().splitlines() == lines


def test_the_plan_names_data_model_and_length_and_trains_nothing(script, model, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(60))
    assert script.main(arguments(model, tmp_path, "--train_file", train, "--do_train", "--plan")) == {}
    shown = capsys.readouterr().out
    assert "60" in shown and "24 updates of 8 samples" in shown and "neg, pos" in shown
    assert not list((tmp_path / "out").glob("*"))


def test_numbers_are_regressed_and_several_labels_are_told_apart(script, model, tmp_path):
    numbers = write_csv(tmp_path / "n.csv", ((text, 0.5 + (label == "pos")) for text, label in rows(40)))
    common = ("--do_train", "--do_eval", "--num_train_epochs", "6")
    found = script.main(arguments(model, tmp_path, "--train_file", numbers, "--validation_file", numbers, *common))
    assert found["eval_pearson"] > 0.9
    several = write_csv(tmp_path / "s.csv", ((text, f"{label}|film") for text, label in rows(40)))
    found = script.main(
        arguments(
            model,
            tmp_path / "b",
            "--train_file",
            several,
            "--validation_file",
            several,
            "--label_separator",
            "|",
            *common,
        )
    )
    assert found["eval_f1_micro"] > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text_column", "txt"], r"train\.csv has no column 'txt'.*Did you mean 'text'"),
        (["--task_name", "mrcp"], r"task_name='mrcp' is none of .*Did you mean 'mrpc'"),
        (["--validation_file", "BAD_LABEL"], r"bad\.csv, row 2 \(line 3.*label 'neu' .* 2 labels of .*train\.csv"),
        (["--validation_file", "EMPTY"], r"empty\.csv, row 1 .*column 'text' is empty"),
        (["--validation_file", "HEADER"], r"header\.csv \(validation\) has no row\."),
        (["--train_file", "train.cvs"], "does not exist"),
    ],
)
def test_bad_input_names_the_file_the_row_and_the_cure(script, model, tmp_path, change, message, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    places = {
        "BAD_LABEL": write_csv(tmp_path / "bad.csv", [("a fine film", "pos"), ("a film", "neu")]),
        "EMPTY": write_csv(tmp_path / "empty.csv", [("", "pos")]),
        "HEADER": write_csv(tmp_path / "header.csv", []),
    }
    change = [places.get(word, word) for word in change]
    with pytest.raises((ValueError, SystemExit)) as caught:
        script.main(arguments(model, tmp_path, "--train_file", train, "--do_train", "--do_eval",
                              "--validation_split_percentage", "20", *change))  # fmt: skip
    assert re.search(message, str(caught.value) + capsys.readouterr().err, re.DOTALL)


def test_a_model_of_other_labels_is_refused_unless_its_head_may_be_replaced(script, model, tmp_path):
    train = write_csv(tmp_path / "train.csv", rows(20))
    script.main(arguments(model, tmp_path, "--train_file", train, "--do_train", "--max_steps", "1"))
    other = write_csv(tmp_path / "other.csv", [("a fine film", "joy"), ("a dull film", "woe"), ("a film", "meh")])
    again = arguments(str(tmp_path / "out"), tmp_path / "b", "--train_file", other, "--do_train", "--max_steps", "1")
    with pytest.raises(ValueError, match=r"trained for the labels \['neg', 'pos'\].*--ignore_mismatched_sizes"):
        script.main(again)
    assert script.main([*again, "--ignore_mismatched_sizes"])["train_samples"] == 3
