"""`packing=True`: the same losses as without it, in fewer tokens, on models of several kinds; what it refuses."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from packs import (
    KINDS,
    LENGTHS,
    PACK,
    SHAPE,
    TOTAL,
    PlainModel,
    WithNumbers,
    WithOffsets,
    WithPositions,
    samples,
    tiny,
    trainer_for,
)
from trainwright import DataCollatorForLanguageModeling, Trainer, default_data_collator

ATTENTIONS = ["sdpa", "eager"]


def token_losses(logits, ids, labels=None):
    """The loss of each predicted token of one row, by what comes before it."""
    labels = ids if labels is None else labels
    losses = nn.functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="none", ignore_index=-100)
    return [(ids[: place + 2], loss) for place, loss in enumerate(losses) if labels[place + 1] != -100]


@torch.no_grad()
def losses_alone(model):
    """By each sample's tokens up to the predicted one, which no two samples share."""
    found = {}
    for sample in samples():
        ids = torch.tensor(sample["input_ids"])
        for seen, loss in token_losses(model(input_ids=ids[None]).logits[0], ids):
            found[tuple(seen.tolist())] = loss.item()
    return found


@torch.no_grad()
def losses_packed(trainer):
    found, model = {}, trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        logits = model(**trainer._prepare_inputs({k: v for k, v in batch.items() if k != "labels"})).logits
        for row, ids, labels, positions in zip(logits, batch["input_ids"], batch["labels"], batch["position_ids"]):
            for place in range(1, len(ids)):
                if labels[place] != -100:
                    seen = tuple(ids[place - positions[place] : place + 1].tolist())
                    found[seen] = nn.functional.cross_entropy(row[place - 1][None], ids[place][None]).item()
    return found


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_token_has_the_loss_that_it_has_in_its_sample_alone(kind, attention, tmp_path):
    model = tiny(kind, attention).eval()
    alone, packed = losses_alone(model), losses_packed(trainer_for(model, tmp_path))
    assert packed.keys() == alone.keys()
    assert len(alone) == TOTAL - len(LENGTHS)
    assert max(abs(packed[seen] - alone[seen]) for seen in alone) <= 1e-6


def one_update(trainer):
    """Labels counted, loss, and weights after one update over all data."""
    counted = []
    count = trainer._get_num_items_in_batch
    trainer._get_num_items_in_batch = lambda *args: counted.append(count(*args)) or counted[-1]
    trainer.train()
    assert trainer.state.global_step == 1
    return counted, trainer.state.log_history[0]["loss"], list(trainer.model.parameters())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_update_over_all_samples_is_the_same_packed_and_padded(kind, attention, tmp_path):
    def pad(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        mask = [row["attention_mask"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        ids, mask = torch.tensor(padded), torch.tensor(mask)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    whole = {"gradient_accumulation_steps": 99, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0}
    packed = one_update(trainer_for(tiny(kind, attention, **no_dropout), tmp_path, **whole))
    whole = {**whole, "packing": False, "packing_length": None}
    padded = one_update(trainer_for(tiny(kind, attention, **no_dropout), tmp_path, collator=pad, **whole))
    assert packed[0] == padded[0] == [TOTAL - len(LENGTHS)]
    assert abs(packed[1] - padded[1]) <= 1e-6
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(packed[2], padded[2]))


DECODER = {**SHAPE, "vocab_size": 64, "max_position_embeddings": 66, "is_decoder": True, "pad_token_id": 1}
FROM_PADDING_ON = [
    "Roberta",
    "XLMRoberta",
    "Camembert",
    "Data2VecText",
]  # their first position is behind that of padding
ALSO = {
    "OPTForCausalLM": {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16},  # an offset of 2 inside
    "BertLMHeadModel": {**DECODER, "pad_token_id": 0},
    "GPTNeoXForCausalLM": SHAPE,
    "FalconForCausalLM": SHAPE,
}
CANNOT = {
    ("FalconForCausalLM", "alibi=True weighs pairs"): {**SHAPE, "alibi": True},
    ("BloomForCausalLM", "forward of BloomForCausalLM takes none"): {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    ("BartForCausalLM", "not known to predict the next token"): {"d_model": 16, "decoder_layers": 1},
    ("EsmForMaskedLM", "not known to predict the next token"): {**SHAPE, "pad_token_id": 1, "mask_token_id": 3},
    ("OpenAIGPTLMHeadModel", "runs on a sample alone, but not on a pack"): {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


def without_dropout(name, values):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls._from_config(cls.config_class(**{"vocab_size": 64, **values}), attn_implementation="eager")
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("drop" in attribute or attribute == "p"):
                setattr(module, attribute, 0.0)
    for parameter in model.parameters():  # of the size of trained ones, so that positions matter
        parameter.data.mul_(5)
    return model


def padded_batch(rows, filler):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [filler] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", [*(f"{family}ForCausalLM" for family in FROM_PADDING_ON), *ALSO])
def test_positions_in_a_pack_are_those_that_the_model_counts_itself(name, tmp_path):
    model = without_dropout(name, ALSO.get(name, DECODER))
    if name not in ALSO or name == "BertLMHeadModel":
        needs_newer_bert(model)
    data = [{"input_ids": [max(token, 3) for token in sample["input_ids"]]} for sample in samples()]
    whole = {"per_device_train_batch_size": 99, "num_train_epochs": 1, "optim": "sgd"}
    packed = one_update(trainer_for(copy.deepcopy(model), tmp_path, data=data, **whole))
    filler = model.config.pad_token_id or 0
    whole = {**whole, "packing": False, "packing_length": None}
    padded = one_update(
        trainer_for(model, tmp_path, data=data, collator=lambda rows: padded_batch(rows, filler), **whole)
    )
    assert packed[0] == padded[0] == [TOTAL - len(LENGTHS)]
    assert packed[1] == pytest.approx(padded[1], rel=1e-5)  # other positions: 1e-3 and more


def needs_newer_bert(model):
    """Older releases of this family take no mask over pairs of tokens."""
    try:
        model(input_ids=torch.full((1, 2), 3), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name, reason", CANNOT)
def test_a_model_that_no_mask_and_no_positions_keep_alike_is_refused_with_the_reason(name, reason, tmp_path):
    trainer = trainer_for(without_dropout(name, CANNOT[name, reason]), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=f"packing=True.*{name}.*{reason}"):
        trainer.train()


def test_a_model_whose_positions_cannot_be_found_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Shifted(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, position_ids=None, **inputs):
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])[None] + 7
            return super().forward(input_ids=input_ids, position_ids=position_ids, **inputs)

    Shifted.__name__ = "GPT2LMHeadModel"
    model = Shifted(transformers.GPT2Config(vocab_size=64, **KINDS["gpt2"][2]))
    with pytest.raises(ValueError, match="predicts differently for a sample in a pack than for the same sample alone"):
        trainer_for(model, tmp_path, max_steps=1).train()


def test_a_model_that_skips_positions_has_fewer_of_them(tmp_path):
    model, row = without_dropout("RobertaForCausalLM", DECODER), [3, 4, 5, 6]  # 66 positions, of which 2 are skipped
    fits, too_long = ([{"input_ids": row * 16}], [{"input_ids": row * 16 + [3]}])
    assert trainer_for(model, tmp_path, data=fits, packing_length=None).get_train_dataloader()
    with pytest.raises(ValueError, match=r"has positions for 64 .*without the first 2.*at most 64"):
        trainer_for(model, tmp_path, data=too_long, packing_length=66).get_train_dataloader()


def test_a_module_that_counts_positions_otherwise_without_them_is_warned_of(tmp_path, caplog):
    class Offset(PlainModel):
        def forward(self, input_ids, labels=None, position_ids=None):
            first = 1 if position_ids is None else 0
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            numbers = (position_ids == 0).cumsum(1)
            return self.run(input_ids + first, labels, numbers[:, :, None] == numbers[:, None, :])

    trainer_for(Offset(), tmp_path, max_steps=1).train()
    assert "Offset predicts differently for a sample in a pack than for the same sample alone" in caplog.text


def test_training_under_bf16_autocast_keeps_samples_apart(tmp_path):
    for attention in ATTENTIONS:
        trainer = trainer_for(tiny("llama", attention), tmp_path, max_steps=2, bf16=True)
        trainer.train()
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_attention_over_variable_lengths_gets_the_borders_of_samples(tmp_path):
    modeling = pytest.importorskip("transformers.modeling_utils")
    calls = []

    def varlen_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
        """What a flash kernel does: each stretch between two offsets attends to itself alone."""
        assert attention_mask is None and query.shape[0] == 1
        offsets = kwargs["cu_seq_lens_q"].tolist()
        assert offsets == kwargs["cu_seq_lens_k"].tolist()
        assert max(b - a for a, b in itertools.pairwise(offsets)) == kwargs["max_length_q"] == kwargs["max_length_k"]
        calls.append(len(offsets))
        parts = [slice(a, b) for a, b in itertools.pairwise(offsets)]
        attend = nn.functional.scaled_dot_product_attention
        rows = [attend(query[:, :, p], key[:, :, p], value[:, :, p], is_causal=True, scale=scaling) for p in parts]
        return torch.cat(rows, dim=2).transpose(1, 2), None

    modeling.ALL_ATTENTION_FUNCTIONS.register("own_flash_kernel", varlen_flash)
    model = tiny("llama").eval()
    alone = losses_alone(model)
    model.config._attn_implementation = "own_flash_kernel"
    packed = losses_packed(trainer_for(model, tmp_path))
    assert calls and packed.keys() == alone.keys()
    assert max(abs(packed[seen] - alone[seen]) for seen in alone) <= 1e-6


def test_a_plain_module_is_given_what_its_forward_names(tmp_path):
    losses = []
    for kind in (WithNumbers, WithPositions, WithOffsets):
        trainer = trainer_for(kind(), tmp_path, max_steps=3)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0]) and losses[2] == pytest.approx(losses[0])


class WithNothing(PlainModel):
    def forward(self, input_ids, labels):
        return self.run(input_ids, labels, torch.ones(*input_ids.shape, input_ids.shape[1]))


def test_a_module_that_cannot_tell_samples_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"WithNothing.forward takes none of \['position_ids'.*would see each other"):
        trainer_for(WithNothing(), tmp_path).train()


class Heedless(PlainModel):
    def forward(self, input_ids, labels, seq_idx):
        return self.run(input_ids, labels, torch.ones(*input_ids.shape, input_ids.shape[1]))


def test_a_module_that_does_not_heed_what_it_is_given_is_found_before_the_first_step(tmp_path):
    model = Heedless().train()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match="Heedless lets the samples of a pack see each other"):
        trainer_for(model, tmp_path).train()
    assert all(map(torch.equal, before, model.state_dict().values())) and model.training


def test_a_transformers_model_whose_attention_ignores_its_mask_is_found(tmp_path):
    modeling = pytest.importorskip("transformers.modeling_utils")

    def causal_only(module, query, key, value, attention_mask, scaling=None, **kwargs):
        attend = nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    modeling.ALL_ATTENTION_FUNCTIONS.register("flash_without_borders", causal_only)
    model = tiny("llama")
    model.config._attn_implementation = "flash_without_borders"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM lets.*'cu_seq_lens_q'"):
        trainer_for(model, tmp_path).train()


def test_a_pack_counts_as_one_sample_and_epochs_have_as_many_as_were_planned(tmp_path):
    trainer = trainer_for(tiny("gpt2"), tmp_path, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    num_packs = -(-TOTAL // PACK)  # best fit leaves no pack half empty here
    assert trainer.num_examples(trainer.get_train_dataloader()) == num_packs
    assert trainer.state.global_step == 2 * -(-num_packs // (2 * 2))


def seen_by(trainer):
    """Tokens of the epochs, as sorted rows."""
    seen = []

    def watch(model, args, inputs):
        if model.training:  # not what is tried before the first step
            seen.append(inputs["input_ids"].flatten().tolist())

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    return seen


def test_each_epoch_has_its_own_order_of_the_same_packs(tmp_path):
    seen = seen_by(trainer_for(WithNumbers(), tmp_path, num_train_epochs=2, per_device_train_batch_size=1))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(first) == sorted(second)
    assert first != second
    assert seen == seen_by(trainer_for(WithNumbers(), tmp_path, num_train_epochs=2, per_device_train_batch_size=1))


def test_the_evaluation_loader_that_a_script_asks_for_is_not_packed(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    trainer = trainer_for(tiny("gpt2"), tmp_path, eval_dataset=rows, max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    (batch,) = trainer.get_eval_dataloader()
    assert batch["input_ids"].tolist() == [[1, 2, 3]] * 4


EVALUATED = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in samples()]


@pytest.mark.parametrize("data", [samples(), EVALUATED], ids=["tokens", "labels"])
def test_an_evaluation_without_a_collator_has_the_loss_of_the_packed_samples(data, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    trainer = trainer_for(tiny("gpt2"), tmp_path, data=data, eval_dataset=data, **arguments)
    alone = losses_alone(trainer.model.eval())
    trainer.train()
    assert len(alone) == TOTAL - len(LENGTHS)
    (found,) = (line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    assert found == pytest.approx(sum(alone.values()) / len(alone), rel=1e-6)


def test_evaluation_data_that_cannot_be_collated_are_found_before_the_first_step(tmp_path):
    steps, arguments = [], {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}

    class Counted(Trainer):
        def training_step(self, *args):
            steps.append(1)
            return super().training_step(*args)

    trainer = trainer_for(
        tiny("gpt2"), tmp_path, cls=Counted, collator=default_data_collator, eval_dataset=EVALUATED, **arguments
    )
    trainer.compute_metrics = lambda found: {}  # which needs the rows of samples
    with pytest.raises(ValueError, match=r"eval_dataset cannot be made into batches.*pads labels too"):
        trainer.train()
    assert steps == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_packed_while_it_is_read(tmp_path, workers):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            yield from samples()[worker.id :: worker.num_workers] if worker else samples()

    trainer = trainer_for(
        tiny("gpt2"), tmp_path, data=Stream(), max_steps=2, dataloader_num_workers=workers, num_train_epochs=1
    )
    tokens = [batch["attention_mask"].sum().item() for batch in trainer.get_train_dataloader()]
    assert sum(tokens) == TOTAL
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_table_is_packed_without_the_columns_that_are_no_tokens(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(samples(text="unused"))
    rows = {
        tuple(map(tuple, batch["input_ids"].tolist()))
        for batch in trainer_for(tiny("gpt2"), tmp_path).get_train_dataloader()
    }
    loader = trainer_for(tiny("gpt2"), tmp_path, data=table).get_train_dataloader()
    assert {tuple(map(tuple, batch["input_ids"].tolist())) for batch in loader} == rows


def test_a_collator_for_language_modelling_decides_which_tokens_are_no_labels(tmp_path):
    class Tokens:
        pad_token_id, mask_token = 7, None

        def __call__(self, *args):
            raise AssertionError("packing tokenises nothing")

    collator = DataCollatorForLanguageModeling(Tokens(), mlm=False)
    data = [{"input_ids": [1, 7, 3], "labels": [9, 9, 9]}]
    trainer = trainer_for(tiny("gpt2"), tmp_path, data=data, collator=collator, packing_length=4)
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].tolist() == [[-100, -100, 3, -100]]


REFUSED = {
    "grouping": ({"group_by_length": True}, "packing=True makes all sequences equally long.*'group_by_length'"),
    "balancing": ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance'.*Choose one"),
    "length without packing": ({"packing": False}, "packing_length=16 has no effect with packing=False"),
    "rule without packing": (
        {"packing": False, "packing_length": None, "packing_long_samples": "truncate"},
        "packing_long_samples='truncate' has no effect with packing=False",
    ),
    "length": ({"packing_length": 1}, "packing_length=1 is not allowed: it must be a finite whole number at least 2"),
    "rule": ({"packing_long_samples": "cut"}, "packing_long_samples='cut'.*split"),
    "past": ({"past_index": 1}, "past_index=1 carries a state"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_contradict_packing_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_for(WithNumbers(), tmp_path, **arguments).train()


def test_models_that_a_mask_cannot_divide_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **small))
    with pytest.raises(ValueError, match=r"BertForMaskedLM cannot be packed.*group_by_length"):
        trainer_for(bert, tmp_path).train()
    shape = {"vocab_size": 64, "num_key_value_heads": 2, "attn_implementation": "sdpa", **small}
    config = transformers.MistralConfig(sliding_window=8, **{**shape, "attn_implementation": "eager"})
    narrow = transformers.MistralForCausalLM(config)
    narrow.config.output_attentions = True  # the weights of all pairs, which attention by sample does not have
    with pytest.raises(ValueError, match=r"sliding_window=8.*flash_attention_2.*output_attentions=True"):
        trainer_for(narrow, tmp_path).train()
    wide = transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=PACK, **shape)).eval()
    alone, packed = losses_alone(wide), losses_packed(trainer_for(wide, tmp_path))
    assert max(abs(packed[seen] - alone[seen]) for seen in alone) <= 1e-6
    with pytest.raises(ValueError, match="positions for 64"):
        trainer_for(tiny("gpt2"), tmp_path, data=samples([100]), packing_length=128).train()


def test_a_collator_or_a_loader_that_packing_would_replace_is_refused(tmp_path):
    def mine(rows):
        return rows

    with pytest.raises(ValueError, match="data_collator=mine would not be used"):
        trainer_for(WithNumbers(), tmp_path, collator=mine).train()

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=1)

    with pytest.raises(ValueError, match="get_train_dataloader loads, but that is overridden"):
        trainer_for(WithNumbers(), tmp_path, cls=OwnLoader).train()


def test_a_pack_of_no_stated_length_is_as_long_as_the_models_input_or_2048(tmp_path):
    assert next(iter(trainer_for(tiny("gpt2"), tmp_path, packing_length=None).get_train_dataloader()))[
        "input_ids"
    ].shape == (2, 64)
    batch = next(iter(trainer_for(WithNumbers(), tmp_path, packing_length=None).get_train_dataloader()))
    assert batch["input_ids"].shape == (1, 2048)


def test_a_run_that_stopped_within_an_epoch_does_not_go_on_with_other_packs(tmp_path):
    trainer = trainer_for(WithNumbers(), tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    other = trainer_for(WithNumbers(), tmp_path, packing_length=32, max_steps=2)
    with pytest.raises(ValueError, match=r"packing_length=16, and now packing_length=32.*ignore_data_skip"):
        other.train(resume_from_checkpoint=True)
    anew = trainer_for(WithNumbers(), tmp_path, packing_length=32, max_steps=2, ignore_data_skip=True)
    anew.train(resume_from_checkpoint=True)
    assert anew.state.global_step == 2


def test_the_plan_is_made_once_per_data_set(tmp_path, caplog):
    class Data(torch.utils.data.Dataset):
        made = 0

        def __len__(self):
            return len(LENGTHS)

        def __getitem__(self, index):
            Data.made += 1
            return {"input_ids": [1] * LENGTHS[index]}

    trainer = trainer_for(WithNumbers(), tmp_path, data=Data())
    with caplog.at_level(logging.INFO, logger="trainwright"):
        logging.getLogger("trainwright").setLevel(logging.INFO)
        for _ in range(3):
            trainer.get_train_dataloader()
    assert Data.made == len(LENGTHS)
    assert caplog.text.count(f"{len(LENGTHS)} samples of {TOTAL} tokens") == 1


@pytest.mark.parametrize("kind", [WithNumbers, WithPositions, WithOffsets])
def test_tokens_without_padding_are_those_of_the_samples(kind, tmp_path):
    class EndIsPadding:
        pad_token_id = 1  # which samples hold too

    trainer = trainer_for(kind(), tmp_path, num_train_epochs=1, include_num_input_tokens_seen="non_padding")
    trainer.processing_class = EndIsPadding()
    trainer.train()
    assert trainer.state.num_input_tokens_seen == TOTAL
