"""Each class of the table in docs/speed.md: `linear_cross_entropy` gives what its logits give, or leaves it alone."""

import re
from pathlib import Path

import pytest
import torch

from tiny_language_models import CONFIGURATIONS, model_of, samples
from trainwright import Trainer, TrainingArguments

transformers = pytest.importorskip("transformers")
PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
ROW = re.compile(r"^\| `(\w+)` \| (used|left alone: .+?) \|$", re.MULTILINE)
TABLE = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
NUM_STEPS = 10


def trainer_for(name, directory, setting):
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=2, max_steps=NUM_STEPS, learning_rate=0.05, optim="sgd",
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        linear_cross_entropy=setting,
    )  # fmt: skip
    return Trainer(model_of(name), args, train_dataset=samples(8))


def gradients_of(trainer):
    """Loss and gradients of one batch, from seed 3."""
    batch = {name: torch.stack([row[name] for row in samples(2)]) for name in samples(1)[0]}
    trainer.model.train()
    torch.manual_seed(3)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    trainer.model.zero_grad()
    return loss.item(), found


def test_the_table_has_every_class_that_is_tried_here():
    assert set(TABLE) == set(CONFIGURATIONS) and len(TABLE) > 25


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_gradients_and_ten_steps_are_those_of_the_logits(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"this release of transformers has no {name}")
    if name.startswith("Qwen2VL") and not hasattr(model_of(name).config, "vocab_size"):
        pytest.skip("Qwen2VL of transformers 4.55 cannot compute its own loss: it reads config.vocab_size")
    theirs = trainer_for(name, tmp_path / "theirs", False)
    if TABLE[name] != "used":
        reason = TABLE[name].removeprefix("left alone: ")
        with pytest.raises(ValueError, match=re.escape(reason)):
            gradients_of(trainer_for(name, tmp_path / "ours", True))
        return
    ours = trainer_for(name, tmp_path / "ours", True)
    (loss, gradients), (expected, expected_gradients) = gradients_of(ours), gradients_of(theirs)
    assert ours._linear_loss.is_checked
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(one.norm() for one in expected_gradients.values())
    for key, one in expected_gradients.items():
        assert (gradients[key] - one).norm() <= 1e-4 * one.norm() + 1e-6 * largest, key
    for trainer in (ours, theirs):
        torch.manual_seed(4)  # of dropout
        trainer.train()
    losses = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == NUM_STEPS
    for (key, one), other in zip(ours.model.named_parameters(), theirs.model.parameters()):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5), key
