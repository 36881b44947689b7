"""Secrets of a subclass, and passwords inside addresses, are in no file, tracker, text or error."""

import json
import logging
from dataclasses import dataclass, field

import pytest
import torch

from line import OneWeight
from trainwright import HfArgumentParser, Trainer, TrainingArguments
from trainwright.state import TrainerState
from trainwright.tracking.base import arguments_of, run_config, without_secrets

CANARY = "canary-0f3b"


@dataclass
class Arguments(TrainingArguments):
    my_token: str = None
    wandb_api_key: str = None
    openai_apikey: str = None
    db_password: str = None
    Client_Secret: str = None
    pin_password: int = None
    ask_password: bool = False
    tracking_uri: str = None
    mirrors: list = field(default_factory=list)
    connection: dict = field(default_factory=dict)
    num_tokens: int = 7
    notes: str = "see http://host:80/a@b"


def secret_arguments(out):
    address = f"postgres://me:{CANARY}@db/runs"
    return Arguments(
        str(out),
        use_cpu=True,
        report_to=[],
        max_steps=1,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
        hub_token=CANARY,
        my_token=CANARY,
        wandb_api_key=CANARY,
        openai_apikey=CANARY,
        db_password=CANARY,
        Client_Secret=CANARY,
        pin_password=90210,
        ask_password=True,
        tracking_uri=address,
        mirrors=[f"https://{CANARY}@host/x", f"https://host/?a=1&access_token={CANARY}&b=2", f"x://u:p@{CANARY}@h/"],
        connection={"uri": address, "inner": {"api_key": CANARY, "eos_token": "</s>"}, "port": 5},
    )


@pytest.mark.parametrize(
    "form",
    [
        repr,
        str,
        Arguments.to_json_string,
        lambda args: str(args.to_dict()),
        lambda args: str(args.to_sanitized_dict()),
        lambda args: str(arguments_of(args)),
        lambda args: str(run_config(args, TrainerState(), OneWeight(), sanitized=False)),
    ],
)
def test_no_form_of_the_arguments_shows_a_secret_of_a_subclass(form, tmp_path):
    args = secret_arguments(tmp_path)
    text = form(args)
    assert CANARY not in text and "90210" not in text
    assert "postgres://me:***@db/runs" in text
    assert (args.wandb_api_key, args.connection["inner"]["api_key"]) == (CANARY, CANARY)  # the run has them


def test_what_is_no_secret_is_shown_as_it_is(tmp_path):
    shown = secret_arguments(tmp_path).to_dict()
    assert (shown["num_tokens"], shown["notes"], shown["ask_password"]) == (7, "see http://host:80/a@b", True)
    assert shown["connection"]["inner"]["eos_token"] == "</s>" and shown["connection"]["port"] == 5
    assert "https://host/?a=1&access_token=***&b=2" in shown["mirrors"]
    ours = {name for name, value in TrainingArguments(tmp_path).to_dict().items() if value == f"<{name.upper()}>"}
    assert ours == {"hub_token", "push_to_hub_token"}


def test_no_file_of_a_run_holds_a_secret_of_a_subclass(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        trainer = Trainer(OneWeight(), secret_arguments(tmp_path), train_dataset=[{"x": torch.ones(2)}])
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "loop_state.json", "README.md"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in caplog.text
    pickled = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (pickled.my_token, pickled.db_password, pickled.num_tokens, pickled.pin_password) == (None, None, 7, None)
    assert trainer.args.db_password == CANARY


def test_what_is_written_in_place_of_a_secret_reads_as_none(tmp_path):
    args = secret_arguments(tmp_path)
    again = Arguments(**json.loads(args.to_json_string()))
    assert (again.my_token, again.wandb_api_key, again.Client_Secret, again.num_tokens) == (None, None, None, 7)


def test_a_subclass_may_bring_its_own_repr(tmp_path):
    @dataclass
    class Own(Arguments):
        def __repr__(self):
            return "mine"

    assert repr(Own(tmp_path)) == "mine"


def test_an_error_of_a_tracker_is_told_without_the_password_of_an_address():
    assert without_secrets(f"cannot reach https://me:{CANARY}@host/x") == "cannot reach https://me:***@host/x"


@pytest.mark.parametrize(
    "words",
    [["--my_tokn", CANARY], [f"--my_tokn={CANARY}"], ["--my_tokn", CANARY, "-5", CANARY], [f"--no_such={CANARY}=x"]],
)
def test_an_unknown_option_is_named_without_its_value(words, tmp_path, capsys):
    parser = HfArgumentParser(Arguments)
    flag = words[0].partition("=")[0]
    with pytest.raises(ValueError, match=f"not used by the HfArgumentParser: \\['{flag}'\\]") as caught:
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    assert CANARY not in str(caught.value)
    with pytest.raises(SystemExit):
        parser.parse_args(["--output_dir", str(tmp_path), *words])
    shown = capsys.readouterr().err
    assert f"unrecognized arguments: {flag}" in shown and CANARY not in shown


def test_an_abbreviation_of_several_options_is_named_without_its_value(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(Arguments).parse_args_into_dataclasses([f"--hub_={CANARY}"])
    shown = capsys.readouterr().err
    assert "--hub_token" in shown and CANARY not in shown


def test_words_before_an_unknown_option_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"HfArgumentParser: \['stray'\]"):
        HfArgumentParser(Arguments).parse_args_into_dataclasses(["stray", "--output_dir", str(tmp_path)])
