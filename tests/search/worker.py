"""One of several processes that search together: `worker.py OUTPUT_DIR STORAGE NUM_TRIALS [die]`.

STORAGE is a URL, or the path of a journal. With "die" the process kills itself in the middle of its first trial.
Prints the numbers of the trials that it trained and the best one it was told.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import optuna
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "shared"))

from line import LineData, LineModel
from trainwright import Trainer, TrainerCallback, TrainingArguments

STUDY = "shared"


def storage_of(text):
    if "://" in text:
        return text
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(text))


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    output_dir, storage, num_trials, *rest = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    trained = []

    def space(trial):
        trained.append(trial.number)
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}

    arguments = TrainingArguments(
        output_dir, max_steps=4, optim="sgd", eval_strategy="steps", eval_steps=2, save_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, log_level="info",
    )  # fmt: skip
    trainer = Trainer(
        model_init=LineModel, args=arguments, train_dataset=LineData(), eval_dataset=LineData(),
        callbacks=[Die()] if rest else [],
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        space, n_trials=int(num_trials), backend="optuna", storage=storage_of(storage), study_name=STUDY,
        load_if_exists=True, pruner=optuna.pruners.NopPruner(),
    )  # fmt: skip
    print(json.dumps({"trained": trained, "best": [best.run_id, best.objective]}))


if __name__ == "__main__":
    main()
