"""One search run by two processes over gloo."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
import optuna, torch.distributed as dist
from trainwright.search import optuna as engine

optuna.logging.set_verbosity(optuna.logging.ERROR)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
trials = []

def space(trial):
    return {"x": trial.suggest_float("x", -4, 4)}

def objective(trial):
    x = engine.params_of(trial, space)["x"]
    layers = trial.suggest_int("layers", 1, 3)  # sampled later, as a model_init would
    trials.append([trial.number, x, layers])
    if trial.number == 0:
        raise MemoryError("in every process")
    for step in range(4):
        trials[-1].append(step)
        engine.report(trial, 100.0 * trial.number, step)
    return x * x

refused = None
keep = {"study_name": "toy", "storage": f"sqlite:///{folder}/study.db", "load_if_exists": True}
if rank == 0:
    optuna.create_study(direction="maximize", **keep)
dist.barrier()
try:
    engine.run(objective, 1, "minimize", space, **keep)
except ValueError as error:
    refused = str(error)

best = engine.run(objective, 4, "minimize", space, catch=(MemoryError,),
                  pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"best": best, "trials": trials, "refused": refused}, file)
dist.destroy_process_group()
"""


def test_two_processes_train_prune_and_fail_the_same_trials_and_return_the_same_best_run(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and "the stored study 'toy' has ['maximize']" in first["refused"]
    assert [trial[0] for trial in first["trials"]] == [0, 1, 2, 3]
    # Trial 0 failed, trial 1 ran to its end, the two after it were pruned at their first report.
    assert [trial[3:] for trial in first["trials"]] == [[], [0, 1, 2, 3], [0], [0]]
    number, x, layers = first["trials"][1][:3]
    assert first["best"] == [str(number), x * x, {"x": x, "layers": layers}, None]
