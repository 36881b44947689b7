"""Every block of code of README and docs: Python runs, page by page; commands are read by their programs' parsers."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch  # once, for the processes of all pages

import forked
import trainwright
from pages import LANGUAGES, ROOT, Block, blocks_of, commands_of, pages
from trainwright import Seq2SeqTrainingArguments, Trainer, cli

# Blocks that are not run, by page. Each says why, in a comment before it; a new one has to be counted here.
NOT_RUN = {"docs/distributed.md": 1, "docs/fsdp.md": 1}
PLACEHOLDERS = {"train.py", "script.py", "your_script.py"}  # programs of the reader
HARMLESS = {"list", "check", "report", "env"}  # commands that are run where the page's Python made what they look at
FIELDS = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
BLOCKS = {page: blocks_of(page) for page in pages()}
EVERY = [block for blocks in BLOCKS.values() for block in blocks]


def python_of(page: Path) -> list[Block]:
    return [block for block in BLOCKS[page] if block.language == "python"]


def named(blocks: Sequence[Block]) -> list[object]:
    return [pytest.param(block, id=block.place) for block in blocks]


def test_every_block_says_what_it_is():
    assert [block.place for block in EVERY if block.language not in LANGUAGES] == []


def test_the_blocks_that_are_not_run_are_those_that_are_counted():
    found: dict[str, int] = {}
    for block in EVERY:
        if block.not_run:
            name = str(block.page.relative_to(ROOT))
            found[name] = found.get(name, 0) + 1
    assert found == NOT_RUN


@pytest.mark.parametrize("page", [page for page in BLOCKS if python_of(page)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    def run(_):
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        os.chdir(work)
        names = {"__name__": "__main__"}
        for block in BLOCKS[page]:
            if block.language == "python" and not block.not_run:
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            if block.language == "sh" and not block.not_run:
                for _, command, *rest in (words for words in commands_of(block) if words[0] == "trainwright"):
                    if command in HARMLESS and all(os.path.exists(word) for word in rest if word[0] != "-"):
                        assert cli.main([command, *rest]) == 0, block.place

    (work := tmp_path / "work").mkdir()
    (ended,) = forked.start([{}], run, tmp_path / "process", limit_s=240)
    assert ended.code == 0, f"{ended.error}\n{ended.output[-3000:]}"


@pytest.mark.parametrize("block", named([block for block in EVERY if block.language == "python"]))
def test_python_names_arguments_that_there_are_also_where_it_is_not_run(block):
    for call in ast.walk(ast.parse(block.text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("TrainingArguments"):
            assert {keyword.arg for keyword in call.keywords} <= FIELDS, block.place


@pytest.mark.parametrize("block", named([block for block in EVERY if block.language == "json"]))
def test_json_is_one_object(block):
    assert isinstance(json.loads(block.text), dict), block.place


@pytest.mark.parametrize("block", named([block for block in EVERY if block.language == "yaml"]))
def test_yaml_is_a_file_that_can_be_trained_from(block, tmp_path, monkeypatch):
    from trainwright.config_file.check import check as job_of
    from trainwright.config_file.reading import read

    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(block.text, encoding="utf-8")
    for name in ("train.csv", "train.txt"):
        Path(name).write_text("")
    settings = read("config.yaml")
    job = job_of(settings)  # an error names what is wrong in the block
    assert job.task == settings.values["task"], block.place


@pytest.mark.parametrize("block", named([block for block in EVERY if block.language == "sh"]))
def test_a_command_is_one_that_its_program_accepts(block):
    assert commands_of(block) or "#SBATCH" in block.text, block.place
    for words in commands_of(block):
        check(words, block)


def check(words: list[str], block: Block) -> None:
    """AssertionError, or the SystemExit of a parser, where a command names what is not there."""
    program, *rest = words
    match program:
        case "trainwright":
            options = cli.build_parser().parse_args(rest)
            if rest[:1] == ["run"] and not options.is_module:
                check_script(options.program, block)
        case "python" | "python3":
            if rest[0] == "-m":
                check([rest[1].split(".")[0], *rest[2:]], block)
            else:
                check_script(rest, block)
        case "torchrun":
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(rest)
            check_program(options, block)
        case "accelerate":
            from accelerate.commands.launch import launch_command_parser

            assert rest[0] == "launch", words
            check_program(launch_command_parser().parse_args(rest[1:]), block)
        case "srun" | "deepspeed":
            first = next(number for number, word in enumerate(rest) if not word.startswith("-"))
            check(rest[first:] if program == "srun" else ["python", *rest[first:]], block)
        case "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert [word for word in rest if "=" not in word and word not in targets] == [], block.place
        case "pip":
            check_installation(rest, block)
        case "pytest":
            with contextlib.suppress(ValueError):
                plugin = rest.index("-p")
                assert importlib.util.find_spec(rest[plugin + 1]), block.place
                del rest[plugin : plugin + 2]
            assert [path for path in rest if path[0] != "-" and not (ROOT / path).exists()] == [], block.place
        case "cd" | "git":
            pass
        case _:
            raise AssertionError(f"{block.place}: nothing is known about {words}")


def check_program(options: object, block: Block) -> None:
    """What a launcher was told to start."""
    arguments = [options.training_script, *options.training_script_args]
    if options.module:
        assert importlib.util.find_spec(arguments[0]), block.place
        check([arguments[0].split(".")[0], *arguments[1:]], block)
    else:
        check_script(arguments, block)


def check_script(words: list[str], block: Block) -> None:
    """A script is there, and has the flags that it is given."""
    script, *rest = words
    flags = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
    if script in PLACEHOLDERS:
        assert flags <= FIELDS, block.place
        return
    assert (ROOT / script).is_file(), f"{block.place}: there is no {script}"
    folder = (ROOT / script).parent
    sources = [ROOT / script, *folder.glob("*.py"), *(ROOT / "src/trainwright/tasks").glob("*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    missing = [
        flag for flag in flags - FIELDS if not re.search(rf"\b{re.escape(flag.replace('-', '_'))}\b|--{flag}\b", text)
    ]
    assert missing == [], block.place


def check_installation(words: list[str], block: Block) -> None:
    """Extras that `pip install` names are those of the project, and files of requirements are there."""
    assert words[0] == "install", block.place
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for before, word in itertools.pairwise(words):
        if before in ("-r", "-c"):
            assert (ROOT / word).is_file(), block.place
        if named_extras := re.fullmatch(r"(?:\.|trainwright)\[([\w,]+)\]", word):
            assert set(named_extras[1].split(",")) <= extras, block.place


def test_every_name_that_a_page_imports_from_trainwright_is_there_also_where_it_is_not_run():
    for block in EVERY:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module == "trainwright":
                    missing = [name.name for name in node.names if not hasattr(trainwright, name.name)]
                    assert missing == [], block.place


class PerToken(torch.nn.Module):
    """A class for each token; the mean loss of those with a label."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, labels):
        logits = self.layer(x)  # (batch, length, 2)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_the_recipe_of_migrating_for_equal_micro_batches_gives_the_mean_of_their_means(
    make_trainer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_of(ROOT / "docs" / "migrating.md")[-1].text, names)
    model, x = PerToken(), torch.randn(4, 5, 3)
    labels = torch.randint(2, (4, 5))
    labels[:2, 1:] = -100  # the first micro-batch has 2 labels, the second 10
    first, second = (model(x[rows], labels[rows])["loss"].item() for rows in (slice(2), slice(2, 4)))
    samples = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]
    for cls, expected in (
        (names["EqualMicroBatches"], (first + second) / 2),
        (Trainer, (2 * first + 10 * second) / 12),
    ):
        trainer = make_trainer(
            trainer={"model": copy.deepcopy(model), "train_dataset": samples, "eval_dataset": None},
            cls=cls,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)
