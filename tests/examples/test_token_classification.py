"""Token classification on tiny CoNLL files, scored by seqeval."""

import json
import re

import pytest
from tests.examples.tiny import example, tiny_bert

SENTENCES = [
    [("anna", "B-PER"), ("smith", "I-PER"), ("went", "O"), ("to", "O"), ("rome", "B-LOC")],
    [("rome", "B-LOC"), ("is", "O"), ("far", "O")],
    [("bob", "B-PER"), ("saw", "O"), ("anna", "B-PER")],
    [("to", "O"), ("paris", "B-LOC"), ("went", "O"), ("bob", "B-PER"), ("smith", "I-PER")],
]


def conll(path, sentences):
    path.write_text("-DOCSTART- O\n\n" + "\n".join("".join(f"{w} X {t}\n" for w, t in one) for one in sentences))
    return str(path)


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("seqeval", reason="pip install seqeval")
    return example("token_classification")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_bert(tmp_path_factory.mktemp("bert"), [word for one in SENTENCES for word, _ in one]))


def arguments(model, out, *more):
    return ["--model_name_or_path", model, "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", "--learning_rate", "1e-2", "--max_seq_length", "12", *more]  # fmt: skip


def test_it_learns_entities_and_writes_a_label_per_word(script, model, tmp_path):
    train, valid = conll(tmp_path / "train.conll", SENTENCES * 8), conll(tmp_path / "valid.conll", SENTENCES)
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(json.dumps({"tokens": [word for word, _ in one]}) for one in SENTENCES))
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "--train_file", train, "--validation_file", valid, "--test_file", str(test),
            "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "15", "--return_entity_level_metrics",
        )
    )  # fmt: skip
    assert metrics["eval_f1"] == metrics["eval_PER_f1"] == metrics["eval_LOC_f1"] == 1.0
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert lines == [" ".join(label for _, label in one) for one in SENTENCES]


def test_a_label_stands_at_the_first_piece_of_its_word():
    from trainwright.tasks.tokens import aligned

    assert aligned([None, 0, 0, 1, None], [3, 5]) == [-100, 3, -100, 5, -100]
    assert aligned([None, 0, 0, 1, None], [3, 5], every_piece=True) == [-100, 3, 3, 5, -100]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("anna B-PER\nwent\n", r"train\.conll, line 2: 'went' has a word and no label"),
        ("anna B-PER\n\nrome B-GPE\n", r"valid\.conll, row 1: the label 'B-LOC' .* is none of .*train\.conll"),
    ],
)
def test_bad_lines_are_named(script, model, tmp_path, lines, message):
    (tmp_path / "train.conll").write_text(lines)
    valid = conll(tmp_path / "valid.conll", SENTENCES[1:2])
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        script.main(arguments(model, tmp_path / "out", "--train_file", str(tmp_path / "train.conll"),
                              "--validation_file", valid, "--do_train", "--do_eval"))  # fmt: skip


def test_a_row_with_more_words_than_labels_is_named(script, model, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"tokens": ["anna"], "labels": ["O"]}\n{"tokens": ["bob", "saw"], "labels": ["O"]}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, row 2 \(line 2\): 2 words in 'tokens' but 1 labels"):
        script.main(arguments(model, tmp_path / "out", "--train_file", str(path), "--do_train"))
