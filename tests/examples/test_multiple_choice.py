"""Multiple choice on tiny questions whose right answer repeats a word of the context."""

import pytest
from tests.examples.tiny import example, tiny_bert

COLOURS = ["red", "blue", "green", "white"]


def rows(number, labels=True):
    header = "sent1,sent2,ending0,ending1,ending2" + (",label" if labels else "")
    lines = [header]
    for index in range(number):
        answers = [COLOURS[(index + shift) % 4] for shift in range(3)]
        right = index % 3
        answers[right] = "yes"  # a word that only right answers hold
        lines.append(f"the door is {COLOURS[index % 4]},it is,{','.join(answers)}" + (f",{right}" if labels else ""))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def script():
    return example("multiple_choice")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_bert(tmp_path_factory.mktemp("bert"), ["the door is it yes", *COLOURS]))


def arguments(model, out, *more):
    return ["--model_name_or_path", model, "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", "--learning_rate", "1e-2", *more]  # fmt: skip


def test_it_learns_which_answer_is_right_and_writes_its_number(script, model, tmp_path):
    (tmp_path / "train.csv").write_text(rows(36))
    (tmp_path / "test.csv").write_text(rows(9, labels=False))
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "--train_file", str(tmp_path / "train.csv"), "--validation_file",
            str(tmp_path / "train.csv"), "--test_file", str(tmp_path / "test.csv"), "--do_train", "--do_eval",
            "--do_predict", "--num_train_epochs", "8",
        )
    )  # fmt: skip
    assert metrics["eval_accuracy"] == 1.0
    lines = (tmp_path / "out" / "predictions.txt").read_text().split()
    assert lines == [str(index % 3) for index in range(9)]


def test_answers_may_be_a_list_in_one_column(script, model, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "the door is", "choices": ["red", "yes"], "label": 1}\n' * 4)
    metrics = script.main(
        arguments(model, tmp_path / "out", "--train_file", str(path), "--do_train", "--max_steps", "1")
    )
    assert metrics["train_samples"] == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("the door is red,it is,red,yes,blue,3", r"row 2 \(line 3.*label 3 .* 0 to 2"),
        ("the door is red,it is,red,,blue,0", r"row 2 .*: 3 answers, of which 1 empty"),
        (",it is,red,yes,blue,0", r"row 2 .*: column 'sent1' is empty"),
    ],
)
def test_bad_rows_are_named(script, model, tmp_path, line, message):
    path = tmp_path / "train.csv"
    path.write_text(rows(1) + line + "\n")
    with pytest.raises(ValueError, match=message):
        script.main(arguments(model, tmp_path / "out", "--train_file", str(path), "--do_train"))
