"""Extractive question answering: windows, the choice of a span, SQuAD's scores, and a tiny model that learns places."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from tests.examples.tiny import example, tiny_bert, words_tokenizer

from trainwright.tasks import answers

NAMES, PLACES = ["anna", "bob", "carl"], ["rome", "paris", "oslo", "lima"]


def squad(path, number, unanswerable=False):
    paragraphs = []
    for index in range(number):
        name, place = NAMES[index % 3], PLACES[index % 4]
        context = f"now {name} lives in {place} and is fine"
        qas = [{"id": f"q{index}", "question": f"where lives {name}",
                "answers": [{"text": place, "answer_start": context.index(place)}]}]  # fmt: skip
        if unanswerable:
            asked = {"id": f"n{index}", "question": f"where lives {name}", "answers": [], "is_impossible": True}
            paragraphs.append({"context": f"now {name} is fine", "qas": [asked]})
        paragraphs.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(path)


WORDS = [*NAMES, *PLACES, "where lives is now in and fine"]


@pytest.fixture(scope="module")
def script():
    return example("question_answering")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_bert(tmp_path_factory.mktemp("bert"), WORDS))


def arguments(model, out, *more):
    return ["--model_name_or_path", model, "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", "--learning_rate", "1e-2", "--max_seq_length", "24", "--doc_stride", "4",
            *more]  # fmt: skip


def test_it_learns_where_answers_lie_and_writes_one_per_question(script, model, tmp_path):
    train, test = squad(tmp_path / "train.json", 24), squad(tmp_path / "test.json", 6)
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "--train_file", train, "--validation_file", train, "--test_file", test,
            "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "12",
        )
    )  # fmt: skip
    assert metrics["eval_exact_match"] == metrics["eval_f1"] == 100.0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found == {f"q{index}": PLACES[index % 4] for index in range(6)}


def test_questions_without_an_answer_are_told_apart(script, model, tmp_path):
    train = squad(tmp_path / "train.json", 24, unanswerable=True)
    common = ("--train_file", train, "--validation_file", train, "--do_train", "--do_eval", "--num_train_epochs", "15")
    with pytest.raises(ValueError, match=r"the question 'n0' has no answer\. Use --version_2_with_negative"):
        script.main(arguments(model, tmp_path / "a", *common))
    metrics = script.main(
        arguments(model, tmp_path / "b", "--version_2_with_negative", "--learning_rate", "1e-2", *common)
    )
    assert metrics["eval_no_answer_exact_match"] == 100.0 and metrics["eval_has_answer_exact_match"] > 80


def test_a_head_that_searches_learns_too(script, tmp_path):
    from transformers import XLNetConfig, XLNetModel

    tokenizer = words_tokenizer(WORDS, tmp_path / "xlnet")
    torch.manual_seed(0)
    XLNetModel(
        XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=64, start_n_top=3, end_n_top=2,
                    pad_token_id=tokenizer.pad_token_id)
    ).save_pretrained(tmp_path / "xlnet")  # fmt: skip
    train = squad(tmp_path / "train.json", 24)
    metrics = script.main(
        arguments(
            str(tmp_path / "xlnet"), tmp_path / "out", "--beam_search", "--train_file", train, "--validation_file",
            train, "--do_train", "--do_eval", "--num_train_epochs", "12",
        )
    )  # fmt: skip
    assert metrics["eval_exact_match"] > 80


def test_the_plan_counts_questions_and_trains_nothing(script, model, tmp_path, capsys):
    train = squad(tmp_path / "train.json", 5)
    assert script.main(arguments(model, tmp_path / "out", "--train_file", train, "--do_train", "--plan")) == {}
    assert "5 train" in capsys.readouterr().out


def test_long_texts_are_cut_into_windows_that_overlap_and_name_their_question(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    context = " ".join(["fine"] * 30 + ["rome"])
    asked = [answers.Question("a", "where", context, ["rome"], [context.index("rome")])]
    columns = answers.windows(asked, tokenizer, max_length=16, stride=4, with_positions=True)
    covered = [{place for place in places if place} for places in columns["offsets"]]
    assert set().union(*covered) == {(m.start(), m.end()) for m in re.finditer(r"\w+", context)}
    assert [len(a & b) for a, b in itertools.pairwise(covered)] == [4] * (len(covered) - 1)
    assert columns["is_impossible"] == [1.0] * (len(covered) - 1) + [0.0]
    last = columns["input_ids"][-1]
    assert tokenizer.decode(last[columns["start_positions"][-1] : columns["end_positions"][-1] + 1]) == "rome"


def test_the_best_span_is_valid_short_enough_and_from_the_likeliest_window():
    asked = [answers.Question("a", "", "ab cd ef", ["cd"], [3])]
    features = {"question_index": [0, 0], "offsets": [[None, (0, 2), (3, 5)], [None, (3, 5), (6, 8)]]}
    start = np.array([[0.0, 5.0, 1.0], [0.0, 2.0, 4.0]])
    end = np.array([[0.0, 1.0, 4.0], [0.0, 9.0, 3.0]])  # the end at 9 goes with the start at 2, in the second window
    choose = answers.best_spans
    assert choose(asked, features, (start, end), answers.SpanSettings()) == ["cd"]
    end[1, 1] = 0.0
    assert choose(asked, features, (start, end), answers.SpanSettings()) == ["ab cd"]
    assert choose(asked, features, (start, end), answers.SpanSettings(max_answer_length=1)) == ["ef"]
    sure = answers.SpanSettings(may_have_no_answer=True)
    assert choose(asked, features, (start, end), sure) == ["ab cd"]
    start[:, 0] = end[:, 0] = 6.0
    assert choose(asked, features, (start, end), sure) == [""]


def test_scores_compare_words_without_case_articles_and_punctuation():
    asked = [
        answers.Question("a", "", "", ["The Cat!", "a dog"], [0, 0]),
        answers.Question("b", "", "", ["red green blue"], [0]),
        answers.Question("c", "", "", [], []),
    ]
    found = answers.squad_scores(["cat", "green red", "no"], asked)
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 4 / 5) / 3)
    assert found["has_answer_f1"] == pytest.approx(100 * (1 + 4 / 5) / 2) and found["no_answer_f1"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "context": "in rome", "answers": {"text": ["rome"], "answer_start": [2]}},
         r"row 1 .*the answer 'rome' is not in its context: at character 2 stands ' rom'"),
        ({"question": "q", "context": "in rome", "answer": "oslo"}, r"the answer 'oslo' is not in its context.*occur"),
        ({"question": "q", "answer": "oslo"}, r"row 1 .*there is no 'context'"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(script, model, tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        script.main(arguments(model, tmp_path / "out", "--train_file", str(path), "--do_train"))
