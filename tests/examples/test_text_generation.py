"""Text generation with a tiny model that was trained to count."""

import json
import re

import pytest
import torch
from tests.examples.tiny import example, words_tokenizer

LINE = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def script():
    return example("text_generation")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GPT-2 that writes the next number, and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = words_tokenizer([LINE], folder, cls_token="[PAD]", sep_token="[PAD]", eos_token="[EOS]")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0,
                   pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    )  # fmt: skip
    ids = torch.tensor([tokenizer(LINE, add_special_tokens=False)["input_ids"]])
    starts = [ids[:, start:] for start in range(6)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        batch = starts[step % len(starts)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    # Special tokens around a prompt would stand between it and what follows.
    words_tokenizer([LINE], folder, post_process=False, cls_token="[PAD]", sep_token="[PAD]", eos_token="[EOS]")
    return str(folder)


def test_it_writes_on_from_prompts_of_different_length(script, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("two three\nfive\none two three four\n")
    out = tmp_path / "texts.jsonl"
    prompts = ["--prompt_file", str(tmp_path / "prompts.txt"), "--output_file", str(out)]
    more = ["--max_new_tokens", "2", "--device", "cpu", "--batch_size", "2"]
    script.main(["--model_name_or_path", model, *prompts, *more])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["texts"] for line in lines] == [["four five"], ["six seven"], ["five six"]]


def test_the_same_seed_draws_the_same_texts(script, model):
    wanted = ["--model_name_or_path", model, "--prompt", "one two", "--do_sample", "--temperature", "3", "--device",
              "cpu", "--num_return_sequences", "3", "--max_new_tokens", "5"]  # fmt: skip
    first, again, other = script.main(wanted), script.main(wanted), script.main([*wanted, "--seed", "7"])
    assert first == again != other and len(first[0]) == 3


def test_the_plan_writes_nothing(script, model, capsys):
    wanted = ["--model_name_or_path", model, "--prompt", "one", "--plan", "--device", "cpu"]
    assert script.main(wanted) == []
    shown = capsys.readouterr().out
    assert "GPT2LMHeadModel on cpu" in shown and "greedy" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "either --prompt or --prompt_file"),
        (["--prompt", "one", "--num_return_sequences", "2"], "would all be the same.*--do_sample"),
        (["--prompt", "one", "--max_new_tokens", "40"], "more than the 32 tokens the model knows"),
    ],
)
def test_bad_requests_name_the_cure(script, model, change, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        script.main(["--model_name_or_path", model, "--device", "cpu", *change])
    assert re.search(message, str(caught.value) + capsys.readouterr().err)
