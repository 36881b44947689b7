"""What a run needs before its first step, counted in modules, the same on every machine.

`benchmarks/start.py` has the times.
"""

import gc
import json
import subprocess
import sys

import pytest

MOST_MODULES_OF_OURS = 165  # about 1 ms each; five ask which launcher and engine there is, five are for wide heads
OF_OTHERS = {"safetensors", "html"}  # beyond what torch has imported itself

BARE_LOOP = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
for batch in torch.utils.data.DataLoader(data, batch_size=2, shuffle=True):
    model(batch["x"]).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
"""
OURS = """
import tempfile
import torch
from trainwright import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).pow(2).mean()}

data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
with tempfile.TemporaryDirectory() as out:
    args = TrainingArguments(out, report_to="none", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    Trainer(Model(), args, train_dataset=data).train()
"""


def modules_after(code):
    """Names in sys.modules after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def test_the_trainer_adds_few_modules_to_those_of_torch():
    added = modules_after("import torch\nfrom trainwright import Trainer, TrainingArguments") - modules_after(
        "import torch"
    )
    ours = {name for name in added if name.partition(".")[0] == "trainwright"}
    assert len(ours) <= MOST_MODULES_OF_OURS
    assert packages(added - ours) <= OF_OTHERS


def test_the_first_step_of_a_run_imports_little_that_a_bare_loop_does_not():
    added = packages(modules_after(OURS)) - packages(modules_after(BARE_LOOP))
    # psutil and tqdm come with the library; the rest is of Python itself
    assert not added & {"accelerate", "transformers", "datasets", "pandas", "matplotlib", "IPython", "huggingface_hub"}
    assert len({name for name in added if name not in sys.stdlib_module_names}) <= 4, sorted(added)


def test_the_command_line_shows_its_help_without_torch_or_numpy():
    code = "from trainwright.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    modules = modules_after(code)
    assert not packages(modules) & {"torch", "numpy", "accelerate", "safetensors"}
    assert len(modules) - len(modules_after("")) <= 100


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_as_before_after_an_import(collects):
    from trainwright.importing import collector_paused

    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError), collector_paused():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_building_an_optimizer_leaves_the_garbage_collector_on():
    check = "import gc\nassert gc.isenabled()\nimport sys\nassert 'torch._dynamo' in sys.modules"
    assert "trainwright.optim.build" in modules_after(f"{OURS}\n{check}")
