"""`Seq2SeqTrainer` on a tiny T5 and a tiny Bart: generation in evaluation, and where its settings come from."""

import json

import numpy as np
import pytest
import torch

from trainwright import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

transformers = pytest.importorskip("transformers")

PAD, EOS, VOCAB = 0, 1, 12
ROWS = [
    {"input_ids": torch.arange(4) + 2 + index % 3, "labels": torch.tensor([2 + index % 5, 3, EOS])}
    for index in range(6)
]


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in LAYERS.items()}
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=8,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        dropout=0.0,
        **sizes,
    )
    return transformers.BartForConditionalGeneration(config)


LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 8}
MODELS = pytest.mark.parametrize("make_model", [t5, bart])


@pytest.fixture
def generating(tmp_path):
    def make(model=None, trainer=None, **arguments):
        values = {"predict_with_generate": True, "per_device_eval_batch_size": 4, "per_device_train_batch_size": 2}
        args = Seq2SeqTrainingArguments(
            str(tmp_path / "out"),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **values,
            **arguments,
        )
        return Seq2SeqTrainer(model or t5(), args, train_dataset=ROWS, eval_dataset=ROWS, **(trainer or {}))

    return make


def generated_by(model, **settings):
    """What the model generates by itself, all rows at once."""
    with torch.no_grad():
        return model.eval().generate(input_ids=torch.stack([row["input_ids"] for row in ROWS]), **settings).numpy()


def same_tokens(found, expected):
    """Equal, and padding where one is wider."""
    width = min(found.shape[1], expected.shape[1])
    return np.array_equal(found[:, :width], expected[:, :width]) and all(
        np.isin(rows[:, width:], [PAD, -100]).all() for rows in (found, expected)
    )


@MODELS
def test_predictions_are_the_tokens_that_the_model_generates(generating, make_model):
    trainer = generating(make_model())
    output = trainer.predict(ROWS, max_length=8)
    assert output.predictions.shape == (6, 8)
    assert same_tokens(output.predictions, generated_by(trainer.model, max_length=8))
    labels = np.stack([row["labels"].numpy() for row in ROWS])
    assert np.array_equal(output.label_ids[:, :3], labels) and (output.label_ids[:, 3:] == PAD).all()


@MODELS
def test_the_loss_is_that_of_the_labels_whatever_is_generated(generating, make_model):
    trainer = generating(make_model())
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert trainer.evaluate(max_length=5)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(max_length=9, num_beams=2)["eval_loss"] == pytest.approx(expected, rel=1e-5)


@MODELS
def test_training_evaluates_with_generation_and_learns(generating, make_model):
    shapes = []
    trainer = generating(
        make_model(),
        {"compute_metrics": lambda p: shapes.append(p.predictions.shape) or {"rows": len(p.label_ids)}},
        num_train_epochs=20,
        learning_rate=0.05,
        eval_strategy="epoch",
        generation_max_length=6,
        metric_for_best_model="rows",
    )
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    assert set(shapes) == {(6, 6)}


def test_without_predict_with_generate_predictions_are_logits(generating, tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Seq2SeqTrainer(t5(), args, eval_dataset=ROWS)
    predictions = trainer.predict(ROWS).predictions
    assert (predictions[0] if isinstance(predictions, tuple) else predictions).shape == (6, 3, VOCAB)


def test_prediction_loss_only_generates_nothing(generating):
    trainer = generating(prediction_loss_only=True)
    trainer.model.generate = None  # calling it would fail
    assert trainer.predict(ROWS).predictions is None and trainer.evaluate()["eval_loss"] > 0


def test_a_prediction_without_labels_generates_and_has_no_loss(generating):
    output = generating().predict([{"input_ids": row["input_ids"]} for row in ROWS], max_length=5)
    assert output.predictions.shape == (6, 5) and output.label_ids is None and "test_loss" not in output.metrics


@pytest.fixture
def asked(generating):
    """What `generate` is asked for in an evaluation: `asked(arguments, call)`."""

    def ask(arguments=None, call=None):
        trainer = generating(**(arguments or {}))
        calls, generate = [], trainer.model.generate
        trainer.model.generate = lambda **kwargs: calls.append(kwargs) or generate(**kwargs)
        trainer.compute_metrics = lambda prediction: {}
        trainer.evaluate(**(call or {}))
        return {name: value for name, value in calls[0].items() if name != "input_ids"}

    return ask


@pytest.mark.parametrize(
    ("arguments", "call", "expected"),
    [
        ({}, {}, {}),
        ({"generation_max_length": 7, "generation_num_beams": 2}, {}, {"max_length": 7, "num_beams": 2}),
        ({"generation_max_length": 7}, {"max_length": 5}, {"max_length": 5}),
        ({"generation_max_length": 7}, {"max_new_tokens": 4}, {"max_new_tokens": 4}),
        ({"generation_max_length": 7}, {"max_length": None}, {"max_length": 7}),
        ({"generation_num_beams": 2}, {"num_beams": 3}, {"num_beams": 3}),
        ({"generation_num_beams": 2}, {"num_beams": 1, "do_sample": False}, {"num_beams": 1, "do_sample": False}),
    ],
)
def test_the_call_wins_over_the_arguments_and_those_over_the_model(asked, arguments, call, expected):
    assert asked(arguments, call) == expected


def test_the_settings_of_one_call_are_forgotten_by_the_next(generating):
    trainer = generating(generation_max_length=6)
    assert trainer.predict(ROWS, max_length=9).predictions.shape[1] == 9
    assert trainer.predict(ROWS).predictions.shape[1] == 6


def test_rows_are_padded_to_the_length_that_was_asked_for(generating):
    model = t5()
    model.lm_head = torch.nn.Linear(8, VOCAB)  # always the end token, so that rows end at once
    model.lm_head.bias.data = 1e4 * torch.nn.functional.one_hot(torch.tensor(EOS), VOCAB).float()
    trainer = generating(model)
    for call, width in (({"max_length": 7}, 7), ({"max_new_tokens": 4}, 5)):
        rows = trainer.predict(ROWS, **call).predictions
        assert rows.tolist() == [[PAD, EOS, *[PAD] * (width - 2)]] * 6
    assert trainer.predict(ROWS, max_length=7).label_ids.shape == (6, 7)


def test_padding_without_any_pad_token_says_what_to_set(generating):
    trainer = generating()
    for part in (trainer.model.config, trainer.model.generation_config):
        part.pad_token_id = part.eos_token_id = None
    with pytest.raises(ValueError, match=r"needs a pad token: set model\.config\.pad_token_id"):
        trainer._pad_tensors_to_max_len(torch.zeros(1, 2), 3)


class OfEachRow:
    """A model that generates a number of tokens that its first input token says, and pads as `generate` does."""

    def __init__(self, model, rows_each=1):
        self.generate, self.rows_each = model.generate, rows_each
        model.generate = self

    def __call__(self, input_ids, **settings):
        rows = [torch.full((int(ids[0]),), int(ids[0])) for ids in input_ids for _ in range(self.rows_each)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=8, n_positions=32, bos_token_id=EOS, eos_token_id=EOS
    )
    return transformers.GPT2LMHeadModel(config)


OF_LENGTHS = [{"input_ids": torch.tensor([length, 3, 4])} for length in (5, 2, 4, 3, 6, 2, 7)]


class Tokenizer:
    """Only the numbers of its tokens."""

    def __init__(self, pad_token_id=None, eos_token_id=None):
        self.pad_token_id, self.eos_token_id = pad_token_id, eos_token_id


@pytest.mark.parametrize("make_model", [t5, bart, gpt2])
@pytest.mark.parametrize(
    ("tokenizer", "pad"), [(None, None), (Tokenizer(9, 8), 9), (Tokenizer(None, 8), 8)], ids=["", "pad", "end"]
)
@pytest.mark.parametrize("arguments", [{}, {"eval_accumulation_steps": 1}, {"eval_sampling_strategy": "length_sorted"}])
def test_generated_rows_of_batches_of_any_width_can_be_decoded(tmp_path, make_model, tokenizer, pad, arguments):
    model = make_model()
    if pad is None:
        pad = EOS if make_model is gpt2 else PAD
    model.config.max_length = model.generation_config.max_length = None  # no length is set
    OfEachRow(model)
    args = arguments_with(predict_with_generate=True, per_device_eval_batch_size=2, **arguments)
    seen = []
    trainer = Seq2SeqTrainer(
        model, args, processing_class=tokenizer, compute_metrics=lambda p: seen.append(p.predictions) or {},
        data_collator=lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows])},
    )  # fmt: skip
    found = trainer.predict(OF_LENGTHS).predictions
    assert found.shape == (7, 7) and found.min() >= 0
    for row, sample in zip(found.tolist(), OF_LENGTHS):
        length = int(sample["input_ids"][0])
        assert row[:length] == [length] * length and set(row[length:]) <= {PAD, pad}
        assert length > 4 or row[-1] == pad  # of another batch than the widest row


def test_labels_beside_generated_rows_are_still_filled_with_minus_100(generating):
    model = t5()
    model.config.max_length = model.generation_config.max_length = None
    OfEachRow(model)
    rows = [{**row, "labels": torch.tensor([3] * int(row["input_ids"][0]))} for row in OF_LENGTHS]
    collate = lambda rows: {  # noqa: E731
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], True, -100),
    }
    trainer = generating(model, {"data_collator": collate})
    trainer.args.per_device_eval_batch_size = 1
    output = trainer.predict(rows)
    assert output.predictions.min() >= 0
    assert [row.tolist() for row in output.label_ids] == [
        [3] * len(row["labels"]) + [-100] * (7 - len(row["labels"])) for row in rows
    ]


def test_beams_of_batches_of_any_width_can_be_decoded(generating):
    model = gpt2()
    model.config.max_length = model.generation_config.max_length = None
    trainer = generating(model, generation_num_beams=2)
    trainer.args.per_device_eval_batch_size = 2
    rows = [{"input_ids": torch.arange(2, 2 + length)} for length in (2, 2, 5, 5, 3)]
    found = trainer.predict(rows, max_new_tokens=2).predictions
    assert found.shape == (5, 7) and found.min() >= 0
    for row, sample in zip(found.tolist(), rows):
        with torch.no_grad():
            alone = model.generate(input_ids=sample["input_ids"][None], max_new_tokens=2, num_beams=2)[0].tolist()
        assert row == alone + [EOS] * (7 - len(alone))


def test_several_sequences_for_a_sample_are_rows_that_follow_each_other(generating):
    model = t5()
    OfEachRow(model, rows_each=2)
    trainer = generating(model)
    found = trainer.predict(OF_LENGTHS, num_return_sequences=2).predictions
    assert found[:, 0].tolist() == [int(row["input_ids"][0]) for row in OF_LENGTHS for _ in range(2)]
    trainer.args.eval_sampling_strategy = "length_sorted"
    with pytest.raises(ValueError, match=r"num_return_sequences=2 .* eval_sampling_strategy"):
        trainer.predict(OF_LENGTHS, num_return_sequences=2)


@MODELS
def test_sequences_are_taken_out_of_a_generation_that_returns_a_dict(generating, make_model):
    as_dict, plain = generating(make_model()), generating(make_model())
    call = {"return_dict_in_generate": True, "output_scores": True}
    found = as_dict.predict(ROWS, max_length=6, **call)
    assert np.array_equal(found.predictions, plain.predict(ROWS, max_length=6).predictions)
    config = transformers.GenerationConfig(**{**SETTINGS, "return_dict_in_generate": True})
    assert generating(t5(), generation_config=config).predict(ROWS).predictions.shape == (6, 6)


# ----------------------------------------------------------------------------------------------- generation_config ----

SETTINGS = {"max_length": 6, "num_beams": 2, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}


def arguments_with(**given):
    return Seq2SeqTrainingArguments("out", report_to="none", use_cpu=True, **given)


@pytest.mark.parametrize("given_as", ["object", "directory", "file", "path", "dict", "its own json", "json text"])
def test_a_generation_config_may_be_an_object_a_directory_or_a_file(generating, tmp_path, given_as):
    config = transformers.GenerationConfig(**SETTINGS)
    folder = tmp_path / "settings"
    config.save_pretrained(folder)
    config.save_pretrained(folder, config_file_name="other.json")
    given = {
        "object": config,
        "directory": str(folder),
        "file": str(folder / "other.json"),
        "path": folder / "other.json",
        "dict": SETTINGS,
        "its own json": json.loads(arguments_with(generation_config=config).to_json_string())["generation_config"],
        "json text": json.dumps(SETTINGS),
    }[given_as]
    trainer = generating(generation_config=given)
    assert {name: getattr(trainer.model.generation_config, name) for name in SETTINGS} == SETTINGS
    assert trainer.model.generation_config is not config
    found = trainer.predict(ROWS).predictions
    assert found.shape[1] == 6 and same_tokens(found, generated_by(t5(), **SETTINGS))


def test_the_settings_of_the_call_win_over_the_generation_config(generating):
    trainer = generating(generation_config=transformers.GenerationConfig(**SETTINGS), generation_max_length=7)
    assert trainer.predict(ROWS).predictions.shape[1] == 7
    assert trainer.predict(ROWS, max_length=4).predictions.shape[1] == 4


def test_the_generation_config_is_saved_with_the_model_as_it_was_given(generating, tmp_path):
    trainer = generating(generation_config=transformers.GenerationConfig(**SETTINGS))
    trainer.evaluate(max_length=9)
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("wrong", [{"num_beams": 1, "early_stopping": True}, {"do_sample": False, "temperature": 0.5}])
def test_a_config_that_contradicts_itself_is_an_error_at_construction(generating, tmp_path, wrong):
    with pytest.raises(ValueError, match=r"generation_config=.*" + "|".join(wrong)):
        generating(generation_config=transformers.GenerationConfig(**{**SETTINGS, **wrong}))


def test_arguments_read_their_own_json_again(tmp_path):
    first = arguments_with(generation_config=transformers.GenerationConfig(**SETTINGS))
    again = json.loads(first.to_json_string())
    trainer = Seq2SeqTrainer(t5(), arguments_with(generation_config=again["generation_config"]))
    assert {name: getattr(trainer.model.generation_config, name) for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("wrong", [{"num_beam": 2}, {"max_length": 6, "temprature": 0.5, "beams": 2}])
def test_a_setting_that_there_is_not_is_named(generating, wrong):
    unknown = [name for name in wrong if name != "max_length"]
    with pytest.raises(ValueError, match=f"'{unknown[0]}'.*of GenerationConfig"):
        generating(generation_config=wrong)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.json"])
def test_a_config_that_is_not_there_is_an_error_at_construction(generating, tmp_path, missing):
    with pytest.raises(OSError, match=missing):
        generating(generation_config=str(tmp_path / missing))


def test_arguments_of_the_plain_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"args=Seq2SeqTrainingArguments"):
        Seq2SeqTrainer(t5(), TrainingArguments(str(tmp_path), report_to="none"))


# ------------------------------------------------------------------------------------------------------------ data ----


def test_sortish_sampling_puts_samples_of_like_length_together(generating):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (64,), generator=generator).tolist()
    rows = [{"input_ids": [2] * length, "labels": [3]} for length in lengths]
    spread = {}
    for sortish in (False, True):
        trainer = generating(sortish_sampler=sortish)
        order = list(trainer._get_train_sampler(rows))
        assert sorted(order) == list(range(64))
        pairs = [(lengths[order[i]], lengths[order[i + 1]]) for i in range(0, 64, 2)]
        spread[sortish] = sum(abs(one - other) for one, other in pairs)
    assert spread[True] < spread[False] / 3


def test_labels_padded_with_minus_100_by_the_collator_take_no_part_in_the_loss(generating):
    class Padder:
        padding_side, pad_token_id, model_input_names = "right", PAD, ["input_ids"]

        def pad(self, samples, return_tensors=None, **kwargs):
            width = max(len(sample["input_ids"]) for sample in samples)
            ids = torch.tensor(
                [[*sample["input_ids"], *[PAD] * (width - len(sample["input_ids"]))] for sample in samples]
            )
            batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
            return {**batch, **{k: [s[k] for s in samples] for k in samples[0] if k != "input_ids"}}

    rows = [{"input_ids": [2, 3, 4][: 1 + i % 3], "labels": [5, 6, 7, EOS][i % 4 :]} for i in range(6)]
    model = t5()
    trainer = generating(model, {"data_collator": DataCollatorForSeq2Seq(Padder(), model=model)})
    output = trainer.predict(rows, max_length=6)
    losses = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows]
    weights = torch.tensor([float(len(row["labels"])) for row in rows])
    token_mean = (torch.stack(losses) * weights).sum() / weights.sum()
    trainer.args.per_device_eval_batch_size = 6
    assert trainer.evaluate(rows, max_length=6)["eval_loss"] == pytest.approx(token_mean.item(), rel=1e-5)
    for found, row in zip(output.label_ids, rows):
        kept = [label for label in found.tolist() if label not in (-100, PAD)]
        assert kept == row["labels"]
