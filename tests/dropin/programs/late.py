"""Installing after the program has imported, and taking it out again; prints one JSON object: question -> answer."""

import dataclasses
import importlib
import inspect
import json
import sys
import tempfile
import types
import warnings

import tiny_task
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks  # noqa: F401
from transformers.trainer_utils import IntervalStrategy

from trainwright.compat.replaced_names import REPLACED, ours

library = types.ModuleType("library")  # another library, which imported earlier
library.Base, library.theirs = Trainer, transformers.training_args.TrainingArguments
sys.modules["library"] = library

their_arguments = TrainingArguments(
    tempfile.mkdtemp(),
    eval_strategy=IntervalStrategy.STEPS,
    eval_steps=2,
    max_steps=4,
    learning_rate=3e-4,
    lr_scheduler_type="cosine",
    accelerator_config={"even_batches": False},
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)


class DerivedTrainer(Trainer):
    pass


class DerivedArguments(TrainingArguments):
    pass


class EarlierCallback(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def called_otherwise():
    """Parameters of replaced functions that ours lack, have at another place, or give another default."""
    found = []
    for module, rows in REPLACED.items():
        if importlib.util.find_spec(f"transformers.{module}") is None:  # of another generation
            continue
        for name, where in rows.items():
            original = getattr(importlib.import_module(f"transformers.{module}"), name, None)
            if isinstance(original, types.FunctionType):
                theirs, own = (
                    inspect.signature(original).parameters,
                    list(inspect.signature(ours(where)).parameters.values()),
                )
                for place, parameter in enumerate(theirs.values()):
                    same = [one for one in own[place : place + 1] if one.name == parameter.name]
                    if not same or parameter.default not in (inspect.Parameter.empty, same[0].default):
                        found.append(f"{name}({parameter.name})")
    return found


def snapshot():
    names = {f"transformers.{module}": rows for module, rows in REPLACED.items()}
    return {
        f"{module}.{name}": id(vars(sys.modules[module])[name])
        for module, rows in {**names, "transformers": dict.fromkeys(vars(transformers)), "library": {"Base": 0}}.items()
        if module in sys.modules
        for name in rows
        if name in vars(sys.modules[module]) and not name.startswith("__")
    }


for module in REPLACED:
    if importlib.util.find_spec(f"transformers.{module}"):
        importlib.import_module(f"transformers.{module}")
before, names_before, theirs = snapshot(), set(vars(transformers)), library.Base
import trainwright  # noqa: E402
import trainwright.dropin  # noqa: E402

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainwright.dropin.install()
answers = {
    "warning": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
    "in this program": [Trainer is trainwright.Trainer, TheirTrainer is trainwright.Trainer],
    "in another module": library.Base is trainwright.Trainer,
    "arguments in another module": library.theirs is transformers.TrainingArguments,
    "table": INTEGRATION_TO_CALLBACK["tensorboard"] is trainwright.TensorBoardCallback,
    "active": trainwright.dropin.is_active(),
}

# What was made before is taken over.
callback = EarlierCallback()
data = tiny_task.Reviews(16)
trainer = Trainer(
    tiny_task.model(),
    their_arguments,
    train_dataset=data,
    eval_dataset=data,
    processing_class=tiny_task.tokenizer(),
    callbacks=[callback],
)
trainer.train()
answers["run"] = [
    trainer.state.global_step,
    callback.steps,
    len([x for x in trainer.state.log_history if "eval_loss" in x]),
]
answers["taken over"] = {
    "class": isinstance(trainer.args, trainwright.TrainingArguments),
    "values": [trainer.args.learning_rate, trainer.args.lr_scheduler_type.value, trainer.args.eval_steps],
    "config": trainer.args.accelerator_config.even_batches,
    "changed": sorted(
        field.name
        for field in dataclasses.fields(their_arguments)
        if hasattr(trainer.args, field.name)
        and getattr(trainer.args, field.name) != getattr(their_arguments, field.name)
    ),
}
trainwright.dropin.install()  # a second time changes nothing

trainwright.dropin.uninstall()
from transformers import AutoTokenizer  # noqa: E402, F401  (the package still answers)

answers["restored"] = sorted(name for name, identity in snapshot().items() if before.get(name, identity) != identity)
answers["left behind"] = sorted(
    name
    for name in set(vars(transformers)) - names_before
    if getattr(vars(transformers)[name], "__module__", "").startswith("trainwright")
)
answers["another module is theirs again"] = library.Base is theirs
answers["active after"] = trainwright.dropin.is_active()
trainwright.dropin.uninstall()  # nor does this
answers["called otherwise"] = called_otherwise()
answers["default arguments"] = trainwright.Trainer.default_arguments is trainwright.TrainingArguments
json.dump(answers, sys.stdout, default=str)
