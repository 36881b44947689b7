"""Translation, summarization and generated answers with a tiny T5 that learns a word-for-word code."""

import json
import re

import pytest
import torch
from tests.examples.tiny import example, words_tokenizer

ENGLISH, GERMAN = ["red", "green", "blue", "black"], ["rot", "gruen", "blau", "schwarz"]


def pairs(number):
    """An article and a colour, and their translations."""
    for index in range(number):
        yield f"the {ENGLISH[index % 4]}", f"das {GERMAN[index % 4]}"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("sacrebleu", reason="pip install sacrebleu")
    pytest.importorskip("rouge_score", reason="pip install rouge-score")
    return example("sequence_to_sequence")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    texts = [*ENGLISH, *GERMAN, "the das question: context: where is it in"]
    tokenizer = words_tokenizer(texts, folder, cls_token="[CLS]", sep_token="</s>", eos_token="</s>")
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0,
                 decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
                 eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def arguments(model, out, task, *more):
    return ["--task", task, "--model_name_or_path", model, "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", "--learning_rate", "1e-2", "--max_source_length", "16", "--max_target_length",
            "8", *more]  # fmt: skip


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


LANGUAGES = ("--source_lang", "en", "--target_lang", "de")


def test_it_learns_to_translate_and_writes_a_line_per_text(script, model, tmp_path):
    train = write(tmp_path / "train.jsonl", ({"translation": {"en": e, "de": d}} for e, d in pairs(64)))
    test = write(tmp_path / "test.jsonl", ({"en": e} for e, _ in pairs(6)))
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "translation", *LANGUAGES, "--train_file", train, "--validation_file", train,
            "--test_file", test, "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "15",
        )
    )  # fmt: skip
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert lines == [german for _, german in pairs(6)]
    assert metrics["eval_gen_len"] == pytest.approx(4, abs=0.2)  # [CLS], two words, </s>


def test_summaries_are_scored_by_rouge(script, model, tmp_path):
    rows = [{"text": text, "summary": text.split()[1]} for text, _ in pairs(32)]
    train = write(tmp_path / "train.jsonl", rows)
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "summarization", "--train_file", train, "--validation_file", train, "--do_train",
            "--do_eval", "--num_train_epochs", "15", "--num_beams", "2",
        )
    )  # fmt: skip
    assert metrics["eval_rouge1"] > 90


def test_evaluations_of_the_training_generate_as_the_last_one_does(script, model, tmp_path, monkeypatch):
    from transformers import T5ForConditionalGeneration

    asked, generate = [], T5ForConditionalGeneration.generate

    def noted(self, *given, **options):
        asked.append((options.get("max_length"), options.get("num_beams")))
        return generate(self, *given, **options)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", noted)
    train = write(tmp_path / "train.jsonl", ({"text": text, "summary": text.split()[1]} for text, _ in pairs(8)))
    script.main(
        arguments(
            model, tmp_path / "out", "summarization", "--train_file", train, "--validation_file", train, "--do_train",
            "--do_eval", "--num_train_epochs", "2", "--eval_strategy", "epoch", "--num_beams", "2",
        )
    )  # fmt: skip
    assert len(asked) >= 3 and set(asked) == {(8, 2)}


def test_answers_are_generated_and_scored_as_squad_does(script, model, tmp_path):
    rows = [{"id": str(i), "question": "where is it", "context": f"in {ENGLISH[i % 4]}", "answer": ENGLISH[i % 4]}
            for i in range(24)]  # fmt: skip
    train = write(tmp_path / "train.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"question": "where is it", "context": "in blue"}])
    metrics = script.main(
        arguments(
            model, tmp_path / "out", "question-answering", "--train_file", train, "--validation_file", train,
            "--test_file", test, "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "30",
        )
    )  # fmt: skip
    assert metrics["eval_exact_match"] > 70  # guessing one of four gives 25
    assert (tmp_path / "out" / "predictions.txt").read_text().strip() in ENGLISH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--task", "translate"], r"task='translate'.*translation"),
        (["--source_lang", "fr"], r"train\.jsonl has no column 'fr'.*\['en', 'de'\]"),
        (["--train_file", "EMPTY"], r"empty\.jsonl, row 2 .*column 'de' is empty"),
    ],
)
def test_bad_input_names_the_file_the_row_and_the_cure(script, model, tmp_path, change, message, capsys):
    train = write(tmp_path / "train.jsonl", ({"en": e, "de": d} for e, d in pairs(4)))
    empty = write(tmp_path / "empty.jsonl", [{"en": "red", "de": "rot"}, {"en": "red", "de": None}])
    wanted = arguments(model, tmp_path / "out", "translation", *LANGUAGES, "--train_file", train, "--do_train")
    with pytest.raises((ValueError, SystemExit)) as caught:
        script.main([*wanted, *(empty if word == "EMPTY" else word for word in change)])
    assert re.search(message, str(caught.value) + capsys.readouterr().err)
