"""Train a byte-level language model on the source text of Python's own standard library.

Real text that every machine has, nothing downloaded; two to six minutes on two cores. Shows: arguments from the command
line or a file, a progress bar, evaluation while training, checkpoints, resuming, a loss curve and generated text.

    python examples/language_model.py                                        # the demo
    python examples/language_model.py --resume_from_checkpoint true          # go on after a stop, however it came
    python examples/language_model.py --learning_rate 1e-3 --output_dir other
"""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch starts its threads: on a busy machine, threads that wait by spinning made this ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.data import Dataset

from trainwright import HfArgumentParser, Trainer, TrainingArguments
from trainwright.report.curve import plot_history
from trainwright.report.html import write_report
from trainwright.report.plan_table import plan_table
from trainwright.tasks.errors import as_script, package

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NUM_BYTES = 256
END = NUM_BYTES  # one token more than there are bytes: the end of a file


@dataclass
class DemoArguments:
    """The model and its data."""

    text_mib: float = field(default=4.0, metadata={"help": "Source text to train on, in MiB."})
    valid_kib: int = field(default=64, metadata={"help": "Source text to validate on, in KiB."})
    block_size: int = field(default=256, metadata={"help": "Bytes the model sees at once."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model, a multiple of 32."})
    num_layers: int = field(default=4, metadata={"help": "Depth of the model."})
    prompt: str = field(
        default="    def __init__(self", metadata={"help": "Start of the text that is generated at the end."}
    )


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """The library's arguments, with defaults for some minutes on two cores."""

    output_dir: str | None = "demo-output"
    max_steps: int = 1200
    per_device_train_batch_size: int = 4  # small batches learn more per byte, and a CPU is no slower with them
    per_device_eval_batch_size: int = 16
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 50
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    logging_steps: float = 50
    eval_strategy: str = "steps"
    eval_steps: float | None = 250
    save_steps: float = 250
    save_total_limit: int | None = 2
    report_to: str = "none"


class Blocks(Dataset):
    """A text cut into blocks of `block_size` tokens, or `num_blocks` of them, evenly spread; each is its own label."""

    def __init__(self, tokens: torch.Tensor, block_size: int, num_blocks: int | None = None) -> None:
        blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)  # (blocks, block_size)
        step = max(1, len(blocks) // num_blocks) if num_blocks else 1
        self.blocks = blocks[::step][:num_blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def standard_library(num_train_bytes: int, num_valid_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, validation) tokens: every tenth file is held out whole, so validation text is new to the model."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[!s]*/*.py"))  # none of site-packages
    parts: tuple[list[int], list[int]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 10 == 9].extend([*path.read_bytes(), END])
        if len(parts[0]) >= num_train_bytes and len(parts[1]) >= num_valid_bytes:
            break
    if not parts[1]:
        raise SystemExit(f"{library} holds {len(files)} files of source text; this example needs at least ten.")
    return torch.tensor(parts[0][:num_train_bytes]), torch.tensor(parts[1])


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Nats per token of a model that knows how frequent each byte is, and nothing else."""
    share = torch.bincount(tokens, minlength=NUM_BYTES + 1).double() / len(tokens)
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def build_model(demo: DemoArguments) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUM_BYTES + 1,
            hidden_size=demo.hidden_size,
            intermediate_size=demo.hidden_size * 3,
            num_hidden_layers=demo.num_layers,
            num_attention_heads=max(1, demo.hidden_size // 32),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def generated_text(model: LlamaForCausalLM, prompt: str, num_bytes: int) -> str:
    """`prompt` and what the model writes after it, `num_bytes` together: it knows no longer texts than its blocks."""
    model.eval()
    prompt_ids = torch.tensor([list(prompt.encode())], device=model.device)  # (1, bytes)
    num_new = max(1, num_bytes - prompt_ids.shape[1])
    tokens = model.generate(prompt_ids, max_new_tokens=num_new, do_sample=True, temperature=0.7, top_k=40)[0]
    return bytes(token for token in tokens.tolist() if token < NUM_BYTES).decode(errors="replace")


def set_aside(output_dir: Path) -> None:
    """Move the checkpoints of an earlier run away, so that a later resume does not take them for those of this run."""
    checkpoints = list(output_dir.glob("checkpoint-*"))
    if checkpoints:
        number = next(n for n in range(1, 10_000) if not (output_dir / f"earlier-{n}").exists())
        (output_dir / f"earlier-{number}").mkdir()
        for checkpoint in checkpoints:
            checkpoint.rename(output_dir / f"earlier-{number}" / checkpoint.name)
        print(f"Starting anew; the checkpoints of an earlier run are now in {output_dir}/earlier-{number}.\n")


def resumed(**changed: int) -> str:
    """The command that started this program, resuming and with `changed` arguments; on one line, to be copied."""
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    words = [python, *sys.argv]
    for name, value in {**changed, "resume_from_checkpoint": "true"}.items():
        if f"--{name}" in words:
            at = words.index(f"--{name}")
            del words[at : at + 2]
        words += [f"--{name}", str(value)]
    return "    " + shlex.join(words)


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((DemoArguments, DemoTrainingArguments), description=__doc__.split("\n")[0])
    demo, args = parser.parse_args_into_dataclasses(arguments)
    for needed in ("transformers", "matplotlib"):  # asked for here: the curve is drawn after the training
        package(needed)
    resume = True if str(args.resume_from_checkpoint).lower() == "true" else args.resume_from_checkpoint
    if not resume:
        set_aside(Path(args.output_dir))

    num_valid_bytes = demo.valid_kib * 1024
    train_tokens, held_out = standard_library(int(demo.text_mib * 2**20), num_valid_bytes)
    train = Blocks(train_tokens, demo.block_size)
    valid = Blocks(held_out, demo.block_size, num_blocks=num_valid_bytes // demo.block_size)
    torch.manual_seed(args.seed)
    model = build_model(demo)
    entropy = unigram_entropy(valid.blocks.flatten())
    rows = [
        ("text", f"{len(train_tokens):,} bytes of Python's standard library, {valid.blocks.numel():,} of other files"),
        ("model", f"Llama, {model.num_parameters():,} parameters, {demo.block_size} bytes of context"),
        ("baseline", f"{entropy:.3f} nats per byte (unigram entropy of the validation text)"),
        ("run", f"{args.max_steps} steps of {args.per_device_train_batch_size * demo.block_size:,} bytes"),
    ]
    print(plan_table(rows))
    print(
        f"\nIf it is stopped, however that happens, this goes on from the newest checkpoint:\n{resumed()}\n", flush=True
    )

    trainer = Trainer(model, args, train_dataset=train, eval_dataset=valid)
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()

    history, steps = trainer.state.log_history, trainer.state.global_step
    curve = plot_history(history, Path(args.output_dir) / "loss.png", title="Python's standard library")
    summary = {"title": "A model of Python's standard library", "validation loss": loss, "unigram entropy": entropy}
    report = write_report(args.output_dir, history, summary | {"steps": steps, "parameters": model.num_parameters()})
    checkpoints = ", ".join(os.path.basename(path) for path in trainer._sorted_checkpoints())
    print(f"\nGenerated after {demo.prompt!r}:\n\n{generated_text(model, demo.prompt, demo.block_size)}\n")
    rows = [
        ("validation loss", f"{loss:.3f} nats per byte; knowing only byte frequencies gives {entropy:.3f}"),
        ("checkpoints", f"{checkpoints} in {args.output_dir}"),
        ("loss curve", str(curve)),
        ("report", str(report)),
    ]
    print(plan_table(rows))
    print(f"\nThis trains it twice as long, going on from here:\n{resumed(max_steps=2 * steps)}")


if __name__ == "__main__":
    as_script(main)
