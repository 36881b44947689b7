"""The public names, what importing them costs, and which file may import which."""

import ast
import subprocess
import sys

import pytest

import trainwright
from imports import FILES, PACKAGE, dotted, imported_modules, package_of

OPTIONAL = set(
    """
    transformers datasets accelerate peft optuna ray sigopt matplotlib IPython deepspeed huggingface_hub sklearn pandas
    tensorboard wandb mlflow comet_ml neptune clearml dvclive codecarbon swanlab trackio flytekit azureml dagshub
    """.split()  # noqa: SIM905
)


def all_imports(path, at_import_time_only=False):
    """Modules a file imports anywhere, or only those imported with it (not in functions, not for type checkers)."""
    package = package_of(path)
    found = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            found.extend(imported_modules(child, package))
            if at_import_time_only:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                    continue
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                    for other in child.orelse:
                        visit(other)
                    continue
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return set(found)


def modules_after(code):
    """Top-level names in sys.modules after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


# -------------------------------------------------------------------------------------------------------- exports ----


@pytest.mark.parametrize("name", trainwright.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(trainwright, name) is not None


def test_the_list_for_type_checkers_agrees_with_the_list_of_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_checkers = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name, "only `X as X` is a re-export"
            for_checkers[alias.name] = node.module.removeprefix("trainwright.")
    assert for_checkers == trainwright._MODULE_OF


def test_a_public_name_knows_its_package_and_dir_lists_it():
    assert set(trainwright.__all__) <= set(dir(trainwright))
    assert len(trainwright.__all__) == len(set(trainwright.__all__))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Trainerr"):
        trainwright.Trainerr  # noqa: B018
    with pytest.raises(ImportError):
        from trainwright import Trainerr  # noqa: F401


# --------------------------------------------------------------------------------------------- fresh interpreters ----


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import trainwright") & {"torch", "numpy", *OPTIONAL}


def test_arguments_and_the_parser_need_no_torch():
    code = "from trainwright import TrainingArguments, HfArgumentParser\nTrainingArguments('out')"
    assert not modules_after(code) & {"torch", *OPTIONAL}


def test_importing_the_trainer_imports_nothing_optional():
    assert not modules_after("from trainwright import Trainer, Seq2SeqTrainer") & OPTIONAL


RUN = """
import tempfile
import torch
from trainwright import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None):
        out = self.linear(x)
        return {"loss": (out - labels).pow(2).mean(), "logits": out}

data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
with tempfile.TemporaryDirectory() as out:
    args = TrainingArguments(out, report_to="none", use_cpu=True, save_steps=1, eval_strategy="epoch", max_steps=2,
                             load_best_model_at_end=True, save_strategy="epoch", disable_tqdm=True)
    trainer = Trainer(Model(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.predict(data)
    trainer.save_model()
"""


def test_a_whole_run_on_a_plain_module_imports_nothing_optional():
    assert not modules_after(RUN) & OPTIONAL


# -------------------------------------------------------------------------------------------------- import arrows ----


def test_nothing_but_the_seq2seq_trainer_and_the_tasks_import_the_trainer():
    allowed = {
        "trainwright.seq2seq",
        "trainwright",
        "trainwright.cli",
        "trainwright.compat.dropin",
        "trainwright.plan_script",
    }
    importing = {dotted(path) for path in FILES if "trainwright.trainer" in all_imports(path)}
    importing = {name for name in importing if not name.startswith("trainwright.tasks.")}  # a client, as users are
    assert "trainwright.seq2seq" in importing
    assert importing <= allowed


def test_nothing_imports_the_tasks_but_the_tasks_and_the_files_that_name_one():
    importing = {
        dotted(path) for path in FILES if any(name.startswith("trainwright.tasks") for name in all_imports(path))
    }
    assert importing and all(name.startswith(("trainwright.tasks.", "trainwright.config_file.")) for name in importing)


def test_no_file_imports_the_trainer_stack_of_transformers():
    forbidden = (
        "transformers.trainer",
        "transformers.training_args",
        "transformers.integrations",
        "transformers.hf_argparser",
        "transformers.optimization",
        "transformers.data.data_collator",
    )
    names = ("Trainer", "TrainingArguments", "Callback", "HfArgumentParser", "DataCollator", "TrainerState")
    offending = {
        f"{dotted(path)}: {module}"
        for path in FILES
        for module in all_imports(path)
        if module.startswith("transformers")
        and (module.startswith(forbidden) or any(part in module.rpartition(".")[2] for part in names))
    }
    assert offending == set()


LIGHT = [
    path
    for path in FILES
    if path.parent.name == "args" or path.name in ("names.py", "state.py", "argparser.py", "outputs.py", "plan.py")
]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_describes_a_run_imports_no_torch_when_imported(path):
    assert not {module.partition(".")[0] for module in all_imports(path, at_import_time_only=True)} & {
        "torch",
        *OPTIONAL,
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_inside_functions_only(path):
    assert not {module.partition(".")[0] for module in all_imports(path, at_import_time_only=True)} & OPTIONAL


def test_the_init_of_each_shelf_is_a_docstring_that_says_what_it_owns():
    for path in FILES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert "Owns" in ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
            assert len(body) == 1 or path.parent.name == "args", path
