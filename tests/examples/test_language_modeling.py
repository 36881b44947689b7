"""Language modelling in its three objectives, on a text whose next word is always the same."""

import math
import re

import pytest
import torch
from tests.examples.tiny import example, words_tokenizer

LINE = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def script():
    return example("language_modeling")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A folder with train.txt, valid.txt and, per objective, a tiny model."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

    folder = tmp_path_factory.mktemp("language")
    (folder / "train.txt").write_text("\n".join([LINE] * 60))
    (folder / "valid.txt").write_text("\n".join([LINE] * 8))
    torch.manual_seed(0)
    for name in ("causal", "masked", "permuted"):
        tokenizer = words_tokenizer([LINE], folder / name, eos_token="[EOS]")
        size, pad = len(tokenizer), tokenizer.pad_token_id
        if name == "causal":
            config = GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=pad)
            model = GPT2LMHeadModel(config)
        elif name == "masked":
            model = BertForMaskedLM(
                BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=64, pad_token_id=pad)
            )  # fmt: skip
        else:
            model = XLNetLMHeadModel(
                XLNetConfig(vocab_size=size, d_model=32, n_layer=1, n_head=2, d_inner=64, pad_token_id=pad)
            )
        model.save_pretrained(folder / name)
    return folder


def run(script, directory, objective, out, *more):
    return script.main(
        [
            "--model_name_or_path", str(directory / objective), "--objective", objective, "--output_dir", str(out),
            "--train_file", str(directory / "train.txt"), "--validation_file", str(directory / "valid.txt"),
            "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "1e-2", "--block_size",
            "12", "--do_train", "--do_eval", *more,
        ]
    )  # fmt: skip


def test_a_causal_model_learns_the_next_word(script, directory, tmp_path):
    metrics = run(script, directory, "causal", tmp_path, "--num_train_epochs", "4")
    assert metrics["eval_accuracy"] > 0.95 and metrics["train_samples"] == 60
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "all_results.json", "README.md"}


def test_a_masked_model_learns_the_hidden_word(script, directory, tmp_path):
    metrics = run(script, directory, "masked", tmp_path, "--line_by_line", "--num_train_epochs", "12")
    assert metrics["eval_accuracy"] > 0.6 and "perplexity" not in metrics


def test_a_permuted_model_gets_better_than_guessing(script, directory, tmp_path):
    metrics = run(script, directory, "permuted", tmp_path, "--num_train_epochs", "4")
    assert metrics["eval_loss"] < math.log(len(LINE.split()))


def test_joined_texts_lose_no_token_and_lines_stay_apart(script, directory, tmp_path):
    from transformers import AutoTokenizer

    from trainwright.tasks import language, sources
    from trainwright.tasks.arguments import DataArguments

    split = sources.load_splits(DataArguments(train_file=str(directory / "train.txt")))["train"]
    tokenizer = AutoTokenizer.from_pretrained(str(directory / "causal"))
    joined = language.tokenized_blocks(split, tokenizer, "text", block_size=50)
    lengths = [len(row) for row in joined["input_ids"]]
    assert sum(lengths) == 60 * 12 and lengths[:-1] == [50] * 14
    lines = language.tokenized_blocks(split, tokenizer, "text", block_size=5, by_line=True)
    assert [len(row) for row in lines["input_ids"]] == [5] * 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--objective", "mask"], r"objective='mask'.*masked"),
        (["--text_column", "txet"], r"train\.txt has no column 'txet'.*Did you mean 'text'"),
        (["--block_size", "100"], r"block_size=100 is more than the 64 tokens"),
        (["--train_file", "EMPTY"], "has no row|no text of two tokens"),
        (["--model_name_or_path", "NEAR"], r"no directory here.*Did you mean 'causal'"),
    ],
)
def test_bad_input_names_what_to_change(script, directory, tmp_path, change, message, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "NEAR": str(directory / "causla")}
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(script, directory, "causal", tmp_path / "out", *(places.get(word, word) for word in change))
    assert re.search(message, str(caught.value) + capsys.readouterr().err, re.DOTALL)
