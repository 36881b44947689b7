"""Measure what fine-tuning with a large vocabulary costs, side by side: CPU seconds and peak of memory.

Owns: the workloads, the contenders, each in a process of its own, the tables. Leaves to others: nothing.

    python benchmarks/fine_tuning.py                       all workloads, every contender, in three quarters of an hour
    python benchmarks/fine_tuning.py --work step           a step: batches of one length, most of it prompt
    python benchmarks/fine_tuning.py --work path           a whole run: usual lengths, two saves, two evaluations
    python benchmarks/fine_tuning.py --work evaluation     perplexity, beside a forward pass without a head
    python benchmarks/fine_tuning.py --quick               small sizes: some minutes
    python benchmarks/fine_tuning.py --only transformers trainwright --rounds 3

The contenders take turns, round by round. TRL is found in .downstream (`make .downstream/installed`, or
`pip install --no-deps --target .downstream -r downstream/requirements.txt`), and left out where it is not.

CPU seconds are those of the process and its children, user and system; the peak of memory is the high-water mark of
resident memory above what the process had once its libraries, its model and its data were there (Linux).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
DOWNSTREAM = FOLDER.parent / ".downstream"
IGNORED = -100
MIB = 2**20


# ---------------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Work:
    """What is trained on what. `Sizes` of `--quick` are smaller in numbers of samples and steps only."""

    layers: int
    width: int
    vocabulary: int
    num_train: int
    num_eval: int
    batch: int
    accumulation: int
    prompt: float  # share of a sample that is no label
    longest: int
    fixed_length: int | None = None  # of all samples; None: lognormal
    mean: float = 200.0  # tokens
    deviation: float = 250.0
    steps: int | None = None  # None: one pass over the data
    warm_up_steps: int = 0  # before CPU time is counted


STEP = Work(4, 256, 64_000, 4 * 16, 0, 4, 1, 0.7, 256, fixed_length=256, steps=8, warm_up_steps=2)
STEP_UNMASKED = Work(4, 256, 64_000, 4 * 16, 0, 4, 1, 0.0, 256, fixed_length=256, steps=8, warm_up_steps=2)
PATH = Work(2, 128, 64_000, 192, 64, 8, 2, 0.6, 1024)
EVALUATION = Work(2, 128, 64_000, 0, 1000, 8, 1, 0.0, 512, fixed_length=512)
WORKS = {"step": STEP, "step, no label masked": STEP_UNMASKED, "path": PATH, "evaluation": EVALUATION}
QUICK: dict[str, dict[str, Any]] = {
    "step": {"steps": 3, "warm_up_steps": 1},
    "step, no label masked": {"steps": 3, "warm_up_steps": 1},
    "path": {"num_train": 32, "num_eval": 16},
    "evaluation": {"num_eval": 16},
}


def work_of(name: str, quick: bool) -> Work:
    from dataclasses import replace

    return replace(WORKS[name], **(QUICK[name] if quick else {}))


def samples(work: Work, number: int, seed: int) -> list[dict[str, list[int]]]:
    """Tokenised samples: a prompt without labels, and an answer."""
    draw = random.Random(seed)
    spread = math.log(1 + (work.deviation / work.mean) ** 2)
    found = []
    for _ in range(number):
        length = work.fixed_length or int(draw.lognormvariate(math.log(work.mean) - spread / 2, math.sqrt(spread)))
        length = min(max(length, 4), work.longest)
        tokens = [draw.randrange(4, work.vocabulary) for _ in range(length)]
        num_prompt = int(length * work.prompt)
        labels = [IGNORED] * num_prompt + tokens[num_prompt:]
        found.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": labels})
    return found


def num_labels(rows: list[dict[str, list[int]]]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def model_of(work: Work) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        intermediate_size=4 * work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.width // 32,
        max_position_embeddings=work.longest,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def pad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a user's collator does: pad to the longest."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([list(row[name]) + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


# ---------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Contender:
    """A way to train, as its user would write it at its best documented settings for this work."""

    name: str
    package: str
    run: Callable[[Work, list[Any], list[Any], str, Meter], dict[str, float]]
    works: tuple[str, ...]


class Meter:
    """CPU seconds and the peak of resident memory from `start` on; `mark` restarts the seconds after a warm-up."""

    def start(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark begins anew
        self.resident = _status("VmRSS")
        self.mark(0)

    def mark(self, step: int) -> None:
        self.cpu, self.wall, self.step = _cpu_s(), time.perf_counter(), step

    def stop(self, step: int = 0) -> dict[str, float]:
        return {
            "cpu_s": _cpu_s() - self.cpu,
            "wall_s": time.perf_counter() - self.wall,
            "steps": step - self.step,
            "peak_mib": (_status("VmHWM") - self.resident) / MIB,
        }


def _cpu_s() -> float:
    return sum(os.times()[:4])


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def marking(callback_class: Any, work: Work, meter: Meter) -> Any:
    """A callback that restarts the seconds once the run is warm."""

    class Mark(callback_class):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == work.warm_up_steps and work.warm_up_steps:
                meter.mark(state.global_step)

    return Mark()


def arguments(work: Work, output_dir: str, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": work.batch,
        "per_device_eval_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "num_train_epochs": 1,
        "max_steps": work.steps or -1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "seed": 0,
    }
    if work.num_eval:
        at_half = {"eval_strategy": "steps", "eval_steps": 0.5, "save_strategy": "steps", "save_steps": 0.5}
        values |= at_half
    return values | more


def trained(cls: Any, callback: Any, work: Work, meter: Meter, data: Sequence[Any], **given: Any) -> dict[str, float]:
    """Train with a Trainer `cls`, and what it cost; the last evaluation loss shows that the same was learned."""
    callbacks = [marking(callback, work, meter)]
    trainer = cls(train_dataset=data[0], eval_dataset=data[1], callbacks=callbacks, **given)
    trainer.train()
    found = meter.stop(trainer.state.global_step)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return found | {"num_steps": trainer.state.global_step, "eval_loss": losses[-1] if losses else math.nan}


def with_trainer(package: str, collate: Any = pad, **more: Any) -> Any:
    """`Trainer` of `package` with a collator that pads; `more` are arguments that differ."""

    def run(work: Work, train: list[Any], valid: list[Any], output_dir: str, meter: Meter) -> dict[str, float]:
        library = importlib.import_module(package)
        cls, args_cls, callback = library.Trainer, library.TrainingArguments, library.TrainerCallback
        data, model = tables(train, valid), model_of(work)
        meter.start()
        args = args_cls(**arguments(work, output_dir, **more))
        return trained(cls, callback, work, meter, data, model=model, args=args, data_collator=collate)

    return run


def tables(train: list[Any], valid: list[Any]) -> tuple[Any, Any]:
    from datasets import Dataset

    return Dataset.from_list(train), Dataset.from_list(valid) if valid else None


def with_trl(**more: Any) -> Any:
    """TRL's SFTTrainer; its loss is computed in chunks by default."""

    def run(work: Work, train: list[Any], valid: list[Any], output_dir: str, meter: Meter) -> dict[str, float]:
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        data = [rows and rows.map(_for_trl).select_columns(["input_ids", "completion_mask"])
                for rows in tables(train, valid)]  # fmt: skip
        model, tokens = model_of(work), tokenizer()
        meter.start()
        args = SFTConfig(**arguments(work, output_dir, max_length=work.longest, **more))
        return trained(SFTTrainer, TrainerCallback, work, meter, data, model=model, args=args, processing_class=tokens)

    return run


def _for_trl(row: dict[str, Any]) -> dict[str, Any]:
    return {"completion_mask": [int(label != IGNORED) for label in row["labels"]]}


def tokenizer() -> Any:
    """TRL asks one for the tokens that pad and end; it tokenises nothing here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def bare(packs: bool) -> Any:
    """A loop by hand: AdamW, clipping, a linear schedule, an evaluation and a checkpoint at half and at the end."""

    def run(work: Work, train: list[Any], valid: list[Any], output_dir: str, meter: Meter) -> dict[str, float]:
        import torch

        model = model_of(work)
        meter.start()
        size, accumulation = (1, 3) if packs else (work.batch, work.accumulation)
        make: Any = packed_by_hand if packs else pad
        units: list[Any] = pack_by_hand(train, work.longest) if packs else train
        units_of_valid: list[Any] = pack_by_hand(valid, work.longest) if packs else valid
        draw = random.Random(0)
        batches: list[list[Any]] = []
        while len(batches) < (work.steps or 1) * accumulation:
            order = draw.sample(units, len(units))
            batches += [order[place : place + size] for place in range(0, len(order), size)]
        if work.steps:
            batches = batches[: work.steps * accumulation]
        num_steps = -(-len(batches) // accumulation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
        loss_of_valid = math.nan
        model.train()
        for step in range(1, num_steps + 1):
            made = [make(rows) for rows in batches[(step - 1) * accumulation : step * accumulation]]
            items = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in made)
            for batch in made:
                model(**batch, num_items_in_batch=items).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step == work.warm_up_steps:
                meter.mark(step)
            if valid and step in (-(-num_steps // 2), num_steps):
                loss_of_valid = evaluated_by_hand(model, make, units_of_valid, size)
                model.save_pretrained(output_dir)
                torch.save(optimizer.state_dict(), os.path.join(output_dir, "optimizer.pt"))
        return meter.stop(num_steps) | {"num_steps": num_steps, "eval_loss": loss_of_valid}

    return run


def evaluated_by_hand(model: Any, make: Any, units: list[Any], size: int) -> float:
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for place in range(0, len(units), size):
            batch = make(units[place : place + size])
            items = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * items
            count += items
    model.train()
    return total / count


def pack_by_hand(rows: list[Any], room: int) -> list[list[Any]]:
    """First fit over falling lengths."""
    packs: list[list[Any]] = []
    left: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        place = next((place for place, free in enumerate(left) if free >= length), None)
        if place is None:
            packs.append([])
            left.append(room)
            place = len(packs) - 1
        packs[place].append(row)
        left[place] -= length
    return packs


def packed_by_hand(packs: list[list[Any]]) -> dict[str, Any]:
    """Packs as rows, with a block-diagonal mask over pairs of tokens."""
    import torch

    width = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    shape = (len(packs), width)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    positions, numbers = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for place, pack in enumerate(packs):
        begin = 0
        for number, row in enumerate(pack):
            end = begin + len(row["input_ids"])
            ids[place, begin:end] = torch.tensor(row["input_ids"])
            labels[place, begin + 1 : end] = torch.tensor(row["labels"][1:])
            positions[place, begin:end] = torch.arange(end - begin)
            numbers[place, begin:end] = number
            begin = end
    attends = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()  # (packs, 1, width, width)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": attends}


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
# Three packs of 1,024 tokens are as many as two batches of 8 samples.
IN_PACKS = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
OURS_PACKED = {**IN_PACKS, "packing_length": 1024}
TRL_PACKED = {**IN_PACKS, "per_device_eval_batch_size": 1, "gradient_checkpointing": False}
STEPS = ("step", "step, no label masked")
CONTENDERS = [
    Contender("transformers", "transformers", with_trainer("transformers"), (*STEPS, "path")),
    Contender("transformers, group_by_length", "transformers", with_trainer("transformers", **BY_LENGTH), ("path",)),
    Contender("TRL", "trl", with_trl(), (*STEPS, "path")),
    Contender("TRL, no checkpointing", "trl", with_trl(gradient_checkpointing=False), STEPS),
    Contender("TRL, packed, no checkpointing", "trl", with_trl(**TRL_PACKED), ("path",)),
    Contender("bare loop", "torch", bare(packs=False), (*STEPS, "path")),
    Contender("bare loop, packed", "torch", bare(packs=True), ("path",)),
    Contender("trainwright", "trainwright", with_trainer("trainwright"), (*STEPS, "path")),
    Contender("trainwright, packed", "trainwright", with_trainer("trainwright", None, **OURS_PACKED), ("path",)),
]


# -------------------------------------------------------------------------------------------------- perplexity of rows


def forward_without_head(work: Work, rows: list[Any], output_dir: str, meter: Meter) -> dict[str, float]:
    """What no evaluation can be cheaper than: the hidden states of every batch, which are forgotten."""
    import torch

    model = model_of(work).eval()
    meter.start()
    with torch.no_grad():
        for place in range(0, len(rows), work.batch):
            batch = pad(rows[place : place + work.batch])
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return meter.stop()


def perplexity_with(package: str) -> Any:
    def run(work: Work, rows: list[Any], output_dir: str, meter: Meter) -> dict[str, float]:
        library = importlib.import_module(package)
        cls, args_cls, metrics = library.Trainer, library.TrainingArguments, None
        table, model = tables(rows, [])[0], model_of(work)
        if package == "trainwright":
            metrics = [importlib.import_module("trainwright.metrics").Perplexity()]
        meter.start()
        args = args_cls(**arguments(work, output_dir, eval_strategy="no", save_strategy="no"))
        trainer = cls(model=model, args=args, eval_dataset=table, data_collator=pad, compute_metrics=metrics)
        found = trainer.evaluate()
        return meter.stop() | {"perplexity": found.get("eval_perplexity", math.exp(found["eval_loss"]))}

    return run


EVALUATIONS: dict[str, tuple[str, Any]] = {
    "forward without a head": ("torch", forward_without_head),
    "transformers, loss only": ("transformers", perplexity_with("transformers")),
    "trainwright, perplexity": ("trainwright", perplexity_with("trainwright")),
}


# ------------------------------------------------------------------------------------------------------------ measuring


def measure_here(work_name: str, name: str, quick: bool) -> None:
    """In a process of its own: run one contender and print what it cost, as JSON on the last line."""
    import torch

    torch.set_num_threads(1)
    work, meter = work_of(work_name, quick), Meter()
    with tempfile.TemporaryDirectory() as directory:
        valid = samples(work, work.num_eval, seed=1)
        if work_name == "evaluation":
            found = EVALUATIONS[name][1](work, valid, directory, meter)
            found["labels"] = num_labels(valid)
        else:
            train = samples(work, work.num_train, seed=0)
            contender = next(one for one in CONTENDERS if one.name == name)
            found = contender.run(work, train, valid, directory, meter)
            found["labels"] = num_labels(train)
    print("\n" + json.dumps(found))


def measure(
    work_name: str, name: str, package: str, quick: bool, glibc_default: bool = False
) -> dict[str, float] | None:
    command = [sys.executable, "-W", "ignore", __file__, "--here", work_name, name, *(["--quick"] if quick else [])]
    # What is laid over the environment first: the newest of each.
    path = [str(FOLDER.parent / "src"), *([str(DOWNSTREAM)] if package == "trl" else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        # Bytes: the peak is what is in use, not what glibc holds on to.
        **({} if glibc_default else {"MALLOC_TRIM_THRESHOLD_": "1000000"}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None or (DOWNSTREAM / package).is_dir()


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        found = [re.sub(r".*-(.*)\.dist-info", r"\1", path.name) for path in DOWNSTREAM.glob(f"{package}-*.dist-info")]
        return found[0] if found else "?"


def contenders_of(work_name: str, only: list[str] | None) -> Iterator[tuple[str, str]]:
    listed = [(one.name, one.package) for one in CONTENDERS if work_name in one.works]
    if work_name == "evaluation":
        listed = [(name, package) for name, (package, _) in EVALUATIONS.items()]
    for name, package in listed:
        if only and not any(name.startswith(text) for text in only):
            continue
        if is_there(package):
            yield name, package
        else:
            print(f"{name} is left out: {package} is not installed.", file=sys.stderr)


def print_table(
    work_name: str, quick: bool, rounds: int, only: list[str] | None, glibc_default: bool
) -> dict[str, list[dict[str, float]]]:
    work, chosen = work_of(work_name, quick), list(contenders_of(work_name, only))
    results: dict[str, list[dict[str, float]]] = {name: [] for name, _ in chosen}
    for number in range(rounds):
        for name, package in chosen:  # in turns, so that all meet the same disturbances
            print(f"  round {number + 1}: {name} ...", file=sys.stderr, flush=True)
            found = measure(work_name, name, package, quick, glibc_default)
            if found is not None:
                results[name].append(found)
    results = {name: found for name, found in results.items() if found}
    of_path = work_name == "path"
    is_step = work_name in STEPS
    print(f"\n{work_name}: {describe(work)}\n")
    unit = "CPU s per step" if is_step else "CPU s"
    last = "perplexity" if work_name == "evaluation" else "evaluation loss" if of_path else "wall s per step"
    print(f"| | version | {unit} | labelled tokens per CPU s | ratio | peak MiB above start | ratio | {last} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    base: tuple[float, float] | None = None
    for name, package in chosen:
        if name not in results:
            continue
        runs = results[name]
        cpu, peak = (statistics.median(run[key] for run in runs) for key in ("cpu_s", "peak_mib"))
        if is_step:
            steps = runs[0]["steps"]
            labels = runs[0]["labels"] / work.num_train * work.batch * work.accumulation
            cpu /= steps
            end = f"{statistics.median(run['wall_s'] for run in runs) / steps:.2f}"
        else:
            labels = runs[0]["labels"]
            value = runs[-1].get("eval_loss" if of_path else "perplexity", math.nan)
            end = "" if math.isnan(value) else f"{value:.5g}"
        speed = labels / cpu
        base = base or (speed, peak)
        cells = [name, version_of(package), f"{cpu:.2f}", f"{speed:.0f}", f"{speed / base[0]:.2f}"]
        cells += [f"{peak:,.0f}", f"{peak / base[1]:.2f}", end]
        print("| " + " | ".join(cells) + " |", flush=True)
    return results


def describe(work: Work) -> str:
    length = work.fixed_length or f"lognormal({work.mean:.0f}, {work.deviation:.0f}) up to {work.longest}"
    number = f"{work.num_train} samples" if not work.steps else f"{work.steps - work.warm_up_steps} steps"
    number = f"{work.num_eval} samples" if not work.num_train else number
    return (
        f"{work.layers} layers of width {work.width}, vocabulary {work.vocabulary:,}, {number} of {length} tokens, "
        f"{100 * work.prompt:.0f} % prompt, batch {work.batch} x {work.accumulation}"
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS), help="which workloads (all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only contenders whose name begins with one of these")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, all contenders in turns (1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    parser.add_argument(
        "--glibc-default",
        action="store_true",
        help="leave glibc as it is: it holds on to freed memory, so that steps take less time and peaks are higher "
        "than what is in use (else MALLOC_TRIM_THRESHOLD_ is set for every contender)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--here", nargs=2, metavar=("WORK", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.here:
        measure_here(*options.here, options.quick)
        return
    load = os.getloadavg()[0]
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores, one thread each, load {load:.1f} at the start")
    settings = options.quick, options.rounds, options.only, options.glibc_default
    found = {name: print_table(name, *settings) for name in options.work}
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
