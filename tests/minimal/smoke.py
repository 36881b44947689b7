"""What each extra switches on, run by the interpreter of an environment that has nothing else (`test_environments.py`).

python smoke.py with EXTRA      do what the extra is for
python smoke.py without         one JSON object: extra -> what is said where it is missing
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright import Trainer, TrainingArguments

PROJECT = Path(__file__).parents[2]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "COMET_START_ONLINE": "0",
    "COMET_OFFLINE_DIRECTORY": ".",
    "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    "CLEARML_OFFLINE_MODE": "1",
    "CLEARML_CACHE_DIR": "clearml",
    "CLEARML__DEVELOPMENT__REPORT_USE_SUBPROCESS": "false",
    "TRACKIO_DIR": "trackio",
    "DVC_NO_ANALYTICS": "true",
    "SWANLAB_MODE": "local",
    "CODECARBON_COUNTRY_ISO_CODE": "FRA",
    "CODECARBON_ALLOW_MULTIPLE_RUNS": "True",
    "NEPTUNE_MODE": "offline",
    "NEPTUNE_PROJECT": "team/project",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Line(nn.Module):
    """Linear regression, wide enough for optimizers that treat matrices by themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        prediction = self.out(self.hidden(x))  # (batch, 1)
        outputs = {"logits": prediction}
        return outputs if labels is None else {"loss": ((prediction - labels) ** 2).mean(), **outputs}


def samples(number: int = 16) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(number, 64, generator=torch.Generator().manual_seed(0))  # (number, 64)
    return [{"x": row, "labels": row[:1]} for row in x]


def trainer(**arguments: Any) -> Trainer:
    values: dict[str, Any] = {
        "output_dir": "out",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    options = {name: arguments.pop(name) for name in ("model", "model_init") if name in arguments}
    if "model_init" not in options:
        options.setdefault("model", Line())
    return Trainer(args=TrainingArguments(**{**values, **arguments}), train_dataset=samples(),
                   eval_dataset=samples(8), **options)  # fmt: skip


def train(**arguments: Any) -> Trainer:
    """Three steps that change the weights and end with a finite loss."""
    run = trainer(**arguments)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert run.train().training_loss < float("inf")
    after = run.model.state_dict()
    assert run.state.global_step == 3
    assert any(not torch.equal(before[name], after[name]) for name in before), "no weight changed"
    return run


def optimizer(name: str, **arguments: Any) -> Callable[[], None]:
    def smoke() -> None:
        train(optim=name, **arguments)

    return smoke


def tracker(name: str) -> Callable[[], None]:
    def smoke() -> None:
        logs: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("trainwright").addHandler(handler)
        train(report_to=name)
        left = {path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "out"}
        assert left or name in ("azure_ml", "comet_ml"), "the tracker wrote nothing"
        assert not [line for line in logs if "switched off" in line], logs

    return smoke


def flyte() -> None:
    """A run within a task of Flyte, outside of which the tracker refuses to start: its checkpoint and its log."""
    from flytekit import task

    assert task(enable_deck=True)(_program_of_flyte)() == 3


def _program_of_flyte() -> int:  # at module level, as every task must be
    from flytekit import current_context

    run = train(report_to="flyte", save_strategy="steps", save_steps=3)
    saved = {path.name for path in Path(current_context().checkpoint._checkpoint_dest).rglob("*.safetensors")}
    assert saved == {"model.safetensors"}, saved
    assert "Log History" in {deck.name for deck in current_context().decks}
    return run.state.global_step


def search(backend: str, hp_space: Callable[[Any], dict[str, Any]] | None = None, **options: Any) -> None:
    run = trainer(model_init=Line, eval_strategy="steps", eval_steps=3)
    best = run.hyperparameter_search(hp_space, n_trials=2, direction="minimize", backend=backend, **options)
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-2


def optuna() -> None:
    search("optuna", lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)})


def bare() -> None:
    """All that needs no extra: train, evaluate, resume, the commands, and nothing of the test environment is there."""
    present = {name for name in ("transformers", "datasets", "IPython", "sklearn", "matplotlib") if _found(name)}
    assert not present, f"{present} come from another environment"
    train(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    again = trainer(max_steps=5)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 5
    command = [sys.executable, "-m", "trainwright"]
    for arguments in (["--help"], ["env"], ["list", "out"], ["check", "out"], ["report", "out"]):
        assert subprocess.run([*command, *arguments], capture_output=True).returncode == 0, arguments


def transformers() -> None:
    """The drop-in, in the ways of `trainwright run` and `trainwright.dropin.install()`."""
    assert not _found("IPython"), "an environment with IPython does not show what is missing"
    program = (
        "import sys\nfrom transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments\n"
        "assert Trainer.__module__ == 'trainwright.trainer', Trainer.__module__\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
        "    num_attention_heads=2, num_key_value_heads=2, vocab_size=32))\n"
        "rows = [{'input_ids': [1, 2, 3], 'labels': [1, 2, 3]}] * 4\n"
        "Trainer(model, TrainingArguments(sys.argv[1], max_steps=1, report_to='none', use_cpu=True), "
        "train_dataset=rows).train()\n"
    )
    Path("program.py").write_text(program)
    subprocess.run([sys.executable, "-m", "trainwright", "run", "program.py", "one"], check=True)
    Path("installed.py").write_text("import trainwright.dropin\ntrainwright.dropin.install()\n" + program)
    subprocess.run([sys.executable, "installed.py", "two"], check=True)
    assert os.path.isfile("one/checkpoint-1/model.safetensors") and os.path.isfile("two/checkpoint-1/manifest.json")
    # The demo draws a curve after its training: what that needs is missed before.
    demo = [sys.executable, str(PROJECT / "examples" / "language_model.py"), "--output_dir", "demo"]
    done = subprocess.run(demo, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'trainwright[plot]'" in done.stderr, done.stderr


def datasets() -> None:
    from datasets import Dataset

    from trainwright.tasks import sources
    from trainwright.tasks.arguments import DataArguments

    Path("train.csv").write_text("text,label\nred,0\nblue,1\n")
    assert len(sources.load_splits(DataArguments(train_file="train.csv"), needs=("train",))["train"]) == 2
    rows = Dataset.from_dict({"x": torch.zeros(8, 64).tolist(), "labels": [[1.0]] * 8, "note": ["left out"] * 8})
    run = trainer()
    run.train_dataset = rows
    run.train()
    assert run.state.global_step == 3


def peft() -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    run = train(model=get_peft_model(Line(), LoraConfig(target_modules=["hidden"], init_lora_weights=False)))
    run.save_model("adapter")
    assert os.path.isfile("adapter/adapter_model.safetensors")
    assert isinstance(PeftModel.from_pretrained(Line(), "adapter"), PeftModel)


def hub() -> None:
    """A run that pushes to a small Hub on this machine."""
    sys.path.insert(0, str(PROJECT / "tests" / "shared"))
    from local_hub import serve

    with serve() as local:
        settings = {"HF_ENDPOINT": local.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none"}
        subprocess.run([sys.executable, __file__, "push"], env={**os.environ, **settings}, check=True)
        assert {"README.md", "model.safetensors"} <= set(local.files("me/model"))


def push() -> None:
    trainer(push_to_hub=True, hub_model_id="model").push_to_hub()


def deepspeed() -> None:
    """Three steps in a process group of one; compiles an operator first (a C++ compiler, minutes)."""
    os.environ["TORCH_EXTENSIONS_DIR"] = os.path.abspath("built")
    run = train(deepspeed={"zero_optimization": {"stage": 2}})
    assert type(run.deepspeed).__name__ == "DeepSpeedEngine"


def yaml() -> None:
    from trainwright import HfArgumentParser

    Path("settings.yaml").write_text("output_dir: out\nlearning_rate: 1.0e-4\n")
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file("settings.yaml")
    assert args.learning_rate == 1e-4


def memory() -> None:
    assert "train_mem_cpu_alloc_delta" in trainer(skip_memory_metrics=False).train().metrics


def plot() -> None:
    from trainwright.report.curve import plot_history

    assert Path(plot_history(train().state.log_history, "curve.png")).read_bytes().startswith(b"\x89PNG")


def notebook() -> None:
    from trainwright.callbacks.notebook import NotebookProgressCallback

    run = trainer(eval_strategy="steps", eval_steps=1)
    run.add_callback(NotebookProgressCallback)
    run.train()


def liger() -> None:
    """The kernels run on a GPU only; without one the model gets them, and cannot be called."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    run = trainer(model=LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), use_liger_kernel=True)
    assert "liger" in run.model.model.layers[0].mlp.forward.__func__.__module__


class Words:
    """A tokenizer of numbers: token 3 is the word "w3", 0 is padding."""

    pad_token_id = 0

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [" ".join(f"w{token}" for token in row if token) for row in rows]


def metrics() -> None:
    """Each package scores a prediction: one of four words is wrong where errors are counted, else none."""
    import numpy

    from trainwright import EvalPrediction
    from trainwright.tasks.sequences import bleu, rouge
    from trainwright.tasks.speech import word_error_rate
    from trainwright.tasks.tokens import entity_scores

    truth = numpy.array([[1, 2, 3, 4, 0]])  # (samples, seq)
    right, wrong = EvalPrediction(truth, truth), EvalPrediction(numpy.array([[1, 2, 3, 5, 0]]), truth)
    assert round(bleu(Words())(right)["bleu"]) == round(rouge(Words())(right)["rougeL"]) == 100
    assert word_error_rate(Words(), is_ctc=False)(wrong)["wer"] == 1 / 4
    labels = numpy.array([[0, 1, 0]])
    assert entity_scores(["O", "B-place"])(EvalPrediction(numpy.eye(2)[labels], labels))["f1"] == 1


def images() -> None:
    from PIL import Image

    from trainwright.tasks.images import random_crop, read_image
    from trainwright.tasks.sources import Split

    Image.new("RGB", (32, 16), "red").save("red.png")
    image = read_image("red.png", Split("train", [{"image": "red.png"}], "train.csv"), 0)
    assert random_crop(image, (8, 8)).getpixel((4, 4)) == (255, 0, 0)


def audio() -> None:
    """FLAC, which Python itself cannot read, at another rate than it was recorded with."""
    import numpy
    import soundfile

    from trainwright.tasks.audio import read_audio
    from trainwright.tasks.sources import Split

    soundfile.write("tone.flac", numpy.sin(numpy.arange(800) / 10), 16_000)
    sound = read_audio("tone.flac", Split("train", [{"audio": "tone.flac"}], "train.csv"), 0, 8_000)
    assert sound.shape == (400,) and 0.9 < abs(sound).max() < 1.1


def digits() -> None:
    script = PROJECT / "examples" / "digits.py"
    subprocess.run([sys.executable, str(script), "--max_steps", "2", "--output_dir", "out", "--use_cpu"], check=True)


def torchao() -> None:
    """Uncompiled: the first compiled step takes a C++ compiler and 15 s (`tests/unit/optim`)."""
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    train(optim="adamw_torch_8bit")


def ray() -> None:
    from ray import init, tune

    init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    search("ray", lambda trial: {"learning_rate": tune.uniform(1e-3, 1e-2)}, storage_path=os.path.abspath("ray"))


def wandb() -> None:
    tracker("wandb")()


WITH: dict[str, Callable[[], None]] = {
    "bare": bare,
    "transformers": transformers,
    "datasets": datasets,
    "peft": peft,
    "deepspeed": deepspeed,
    "hub": hub,
    "yaml": yaml,
    "memory": memory,
    "plot": plot,
    "notebook": notebook,
    "liger": liger,
    "metrics": metrics,
    "images": images,
    "audio": audio,
    "digits": digits,
    "bitsandbytes": optimizer("adamw_bnb_8bit"),
    "torchao": torchao,
    "galore": optimizer("galore_adamw", optim_target_modules=["hidden"]),
    "apollo": optimizer("apollo_adamw", optim_target_modules=["hidden"]),
    "lomo": optimizer("lomo"),
    "grokadamw": optimizer("grokadamw"),
    "schedulefree": optimizer("schedule_free_adamw", lr_scheduler_type="constant"),
    "optimi": optimizer("stable_adamw"),
    "optuna": optuna,
    "ray": ray,
    "flyte": flyte,
    **{
        extra: tracker(name)
        for extra, name in {
            "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml",
            "neptune": "neptune", "clearml": "clearml", "dvclive": "dvclive", "codecarbon": "codecarbon",
            "swanlab": "swanlab", "trackio": "trackio", "azureml": "azure_ml", "dagshub": "dagshub",
        }.items()
    },
}  # fmt: skip


def without() -> dict[str, str]:
    """What is said where each extra is missing, by extra. Packages that accelerate brings are hidden for it."""
    found = {}
    for extra, use in WITHOUT.items():
        hidden = _ALWAYS_THERE.get(extra)
        loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if hidden and name.split(".")[0] == hidden}
        if hidden:
            sys.modules[hidden] = None  # type: ignore[assignment]
        try:
            use()
            found[extra] = ""
        except Exception as error:
            found[extra] = str(error)
        finally:
            if hidden:
                del sys.modules[hidden]
                sys.modules.update(loaded)
    return found


def _missing_package(module: str) -> Callable[[], Any]:
    def use() -> None:
        from trainwright.tasks.errors import package

        package(module)

    return use


def _install_dropin() -> None:
    import trainwright.dropin

    trainwright.dropin.install()


# Extra -> the module it brings, where accelerate needs that as well.
_ALWAYS_THERE = {"hub": "huggingface_hub", "yaml": "yaml", "memory": "psutil"}
WITHOUT: dict[str, Callable[[], Any]] = {
    "transformers": _install_dropin,
    "deepspeed": deepspeed,
    "hub": lambda: trainer(push_to_hub=True),
    "yaml": yaml,
    "memory": memory,
    "plot": plot,
    "notebook": notebook,
    **{extra: _missing_package(module) for extra, module in {
        "datasets": "datasets", "metrics": "sacrebleu", "images": "PIL", "audio": "soundfile", "digits": "sklearn",
    }.items()},
    **{extra: WITH[extra] for extra in (
        "bitsandbytes", "torchao", "galore", "apollo", "lomo", "grokadamw", "schedulefree", "optimi", "optuna",
        "tensorboard", "wandb", "mlflow", "comet", "neptune", "clearml", "dvclive", "codecarbon", "swanlab", "trackio",
        "azureml", "dagshub",
    )},
    "flyte": tracker("flyte"),
    "ray": lambda: search("ray"),
}  # fmt: skip


def _found(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def main() -> None:
    if sys.argv[1:] == ["push"]:
        return push()
    os.environ.update(OFFLINE)
    if sys.argv[1:] == ["without"]:
        print(json.dumps(without()))
    else:
        WITH[sys.argv[2]]()


if __name__ == "__main__":
    main()
