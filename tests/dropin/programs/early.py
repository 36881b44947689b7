"""What a program sees that was started on our Trainer; prints one JSON object: question -> answer."""

import copy
import dataclasses
import importlib
import json
import pathlib
import pickle
import sys
import warnings

import trainwright.dropin

trainwright.dropin.install()

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    HfArgumentParser,
    IntervalStrategy,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback  # noqa: E402
from transformers.trainer_utils import EvalPrediction  # noqa: E402

from trainwright.compat.replaced_names import REPLACED, ours  # noqa: E402


@dataclasses.dataclass
class MyArguments(TrainingArguments):
    """As libraries derive theirs: a field added, a default changed."""

    temperature: float = 0.5
    logging_steps: float = 10


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")

    @dataclasses.dataclass
    class Namesakes(TrainingArguments):
        """A program's own fields, two of which only we have, too."""

        packing: str = "tight"
        ema_decay: float = 0.5
        temperature: float = 0.5


class MyTrainer(Trainer):
    pass


class MyCallback(TrainerCallback):
    pass


def defined_here(module):
    """Names that a module defines, not those it imports: what `__module__` says, and its tables and constants."""
    found = importlib.import_module(f"transformers.{module}")
    return sorted(
        name for name, value in vars(found).items() if getattr(value, "__module__", None) == f"transformers.{module}"
    )


def module_of(name):
    return importlib.import_module(f"transformers.{name}")


def documented_but_absent():
    """Names that the documents of either generation give to a module, and that it does not have."""
    path = pathlib.Path(__file__).parent.parent / "data" / "documented_names.json"
    generations = json.loads(path.read_text(encoding="utf-8"))
    return sorted(
        {
            f"{module}.{name}"
            for of_modules in generations.values()
            for module, names in of_modules.items()
            for name in names
            if not hasattr(module_of(module), name)
        }
    )


modules = [name for name in REPLACED if importlib.util.find_spec(f"transformers.{name}")]
arguments = MyArguments("out", report_to="none", use_cpu=True, eval_strategy="steps", eval_steps=5)
replaced = dataclasses.replace(arguments, learning_rate=1e-3)
(parsed,) = HfArgumentParser(MyArguments).parse_args_into_dataclasses(["--output_dir", "o", "--temperature", "1"])
answers = {
    "version": transformers.__version__,
    "still theirs": {name: defined_here(name) for name in modules},
    "not ours": [
        f"{name}.{attribute}"
        for name in modules
        for attribute, where in REPLACED[name].items()
        if getattr(module_of(name), attribute) is not ours(where)
    ],
    "absent": documented_but_absent(),
    "package": [cls.__module__ for cls in (Trainer, Seq2SeqTrainer, TrainerCallback, TensorBoardCallback)],
    "isinstance": [
        issubclass(Seq2SeqTrainer, Trainer),
        issubclass(Seq2SeqTrainingArguments, TrainingArguments),
        issubclass(TrainingArguments, ours("args.training:TrainingArguments")),
        isinstance(arguments, TrainingArguments),
        isinstance(arguments.eval_strategy, IntervalStrategy),
        issubclass(TensorBoardCallback, TrainerCallback),
        issubclass(MyTrainer, ours("trainer:Trainer")),
        isinstance(EvalPrediction(0, 0), ours("outputs:EvalPrediction")),
    ],
    "pickled": [
        pickle.loads(pickle.dumps(arguments)) == arguments,
        type(pickle.loads(pickle.dumps(arguments))) is MyArguments,
        pickle.loads(pickle.dumps(TrainingArguments("out", use_cpu=True))).output_dir == "out",
        pickle.loads(pickle.dumps(IntervalStrategy.STEPS)) is IntervalStrategy.STEPS,
        copy.deepcopy(arguments) == arguments,
    ],
    "replaced": [replaced.learning_rate, replaced.eval_steps, replaced.temperature, replaced.logging_steps],
    "namesakes": [
        [Namesakes("out").packing, Namesakes("out").packs, TrainingArguments("out", packing=True).packs],
        [[str(warning.message), warning.filename == __file__] for warning in caught],
    ],
    "first argument": arguments.output_dir,
    "parsed": [parsed.temperature, parsed.output_dir],
    "defaults": {
        field.name: field.default if field.default_factory is dataclasses.MISSING else "factory"
        for field in dataclasses.fields(TrainingArguments)
    },
    "without arguments": type(ours("trainer:Trainer").default_arguments("x")) is TrainingArguments,
}
json.dump(answers, sys.stdout, default=str)
