"""What a program sees of the Trainer's messages through the logging of `transformers`; prints question -> answer."""

import io
import json
import logging
import os
import sys

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # of the program's user
import torch

import trainwright.dropin

trainwright.dropin.install()

import transformers  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.utils import logging as their_logging  # noqa: E402

answers = {}


class Captured:
    """What a handler on the logger `name` receives, as a program's tests attach one."""

    def __init__(self, name):
        self.logger, self.text = logging.getLogger(name), io.StringIO()
        self.handler = logging.StreamHandler(self.text)

    def __enter__(self):
        self.logger.addHandler(self.handler)
        return self

    def __exit__(self, *exception):
        self.logger.removeHandler(self.handler)

    def __contains__(self, words):
        return words in self.text.getvalue()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight - x).square().mean()}


class Counter(TrainerCallback):
    pass


def trainer(**arguments):
    given = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 1, **arguments}
    args = TrainingArguments(os.path.join(sys.argv[1], "out"), **given)
    return Trainer(Model(), args, train_dataset=[{"x": torch.ones(1)}] * 8)


def captured_training(**arguments):
    with Captured("transformers.trainer") as log:
        trainer(**arguments).train()
    return "Running training" in log


with Captured("transformers.trainer_callback") as log:
    trainer().callback_handler.add_callback(transformers.DefaultFlowCallback)
    answers["TRANSFORMERS_VERBOSITY=error silences a warning"] = "already one" not in log

their_logging.set_verbosity_info()
answers["verbosity info"] = captured_training()
their_logging.set_verbosity_warning()
answers["verbosity warning"] = captured_training()
answers["log_level info"] = captured_training(log_level="info")
answers["verbosity after log_level info"] = their_logging.get_verbosity()
answers["log_level error"] = captured_training(log_level="error")
answers["verbosity after log_level error"] = their_logging.get_verbosity()
answers["disable_tqdm at verbosity error"] = trainer(disable_tqdm=None).args.disable_tqdm
answers["process level"] = trainer().args.get_process_log_level()

their_logging.set_verbosity_warning()
answers["disable_tqdm at verbosity warning"] = trainer(disable_tqdm=None).args.disable_tqdm
with Captured("transformers.trainer_callback") as log:
    one = trainer()
    one.add_callback(Counter)
    one.add_callback(Counter())
    answers["callback twice"] = f"{Counter} is added, but there is already one" in log

trainer().train()
where = "trainer_utils" if transformers.__version__.startswith("5") else "trainer"
with Captured(f"transformers.{where}") as log:
    resumed = trainer(save_steps=2, per_device_train_batch_size=4)
    resumed.train(resume_from_checkpoint=os.path.join(sys.argv[1], "out", "checkpoint-1"))
    answers["changed settings"] = [line.strip() for line in log.text.getvalue().splitlines() if line.startswith("\t")]

their_logging.set_verbosity_info()
with Captured("transformers") as log:
    logging.getLogger("trainwright.imported_later").info("from a module that is imported later")
    answers["imported later"] = "from a module that is imported later" in log

trainwright.dropin.uninstall()
their_logging.set_verbosity_error()
with Captured("trainwright") as ours, Captured("transformers") as theirs:
    import trainwright.trainer

    trainwright.trainer.logger.warning("after uninstall")
    answers["after uninstall"] = ["after uninstall" in ours, "after uninstall" in theirs]

print()
print(json.dumps(answers))
