"""Write on from a prompt, with a trained language model. Inference only: the model of `language_modeling.py`, say.

    python examples/text_generation.py --model_name_or_path out --prompt "Once upon a time" --do_sample
    python examples/text_generation.py --model_name_or_path out --prompt_file prompts.txt --output_file texts.jsonl
    python examples/text_generation.py --model_name_or_path my-t5 --prompt "translate English to German: Good day."

Prompts come from --prompt, from a txt file (one per line), or from a csv or json file with the column "prompt". Shows a
progress bar over many prompts; texts go to the terminal, or to a jsonl file with "prompt" and "texts".
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from trainwright import set_seed
from trainwright.args.checks import check_number
from trainwright.args.options import option
from trainwright.report.plan_table import plan_table
from trainwright.tasks import checks, models, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script


@dataclass
class GenerationArguments:
    """The prompts and what is written after them."""

    prompt: str | None = option(None, "One prompt.")
    prompt_file: str | None = option(None, "Many prompts: a txt file, or csv or json with the column 'prompt'.")
    output_file: str | None = option(None, "Write texts to this jsonl file instead of the terminal.")
    max_new_tokens: int = option(64, "Tokens to write at most.")
    num_return_sequences: int = option(1, "Texts per prompt.")
    do_sample: bool = option(False, "Draw each token by its probability, instead of the likeliest.")
    temperature: float = option(1.0, "With do_sample: below 1 likely tokens become likelier, above 1 less so.")
    top_k: int = option(50, "With do_sample: draw among so many likeliest tokens. 0: among all.")
    top_p: float = option(1.0, "With do_sample: draw among the likeliest tokens that have this probability together.")
    num_beams: int = option(1, "Beginnings kept at once; the text with the highest probability wins. 1: greedy.")
    repetition_penalty: float = option(1.0, "Above 1: words that were written become less likely.")
    batch_size: int = option(8, "Prompts worked on at once.")
    seed: int = option(42, "The same seed draws the same texts.")
    device: str | None = option(None, "Such as cuda or cpu. None: cuda where there is one.")
    plan: bool = option(False, "Show what would be done, and end.")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_return_sequences", "num_beams", "batch_size"):
            check_number(self, name, 1, whole=True)
        check_number(self, "temperature", 0, above=True)
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("Give either --prompt or --prompt_file.")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} texts would all be the same: add --do_sample, or "
                f"--num_beams {self.num_return_sequences} or more."
            )


def prompts_of(given: GenerationArguments) -> list[str]:
    if given.prompt is not None:
        return [given.prompt]
    split = sources.load_splits(DataArguments(test_file=given.prompt_file))["test"]
    column = checks.pick_column(split, "prompt", None, ("prompt", "text"), "the prompts")
    checks.check_filled(split, column)
    return list(split.rows[column])


def texts_after(model: object, tokenizer: object, prompts: list[str], given: GenerationArguments) -> list[list[str]]:
    """Texts for each prompt, prompts of a batch padded on the left so that writing begins right after them."""
    is_encoder_decoder = model.config.is_encoder_decoder
    options = {"do_sample": given.do_sample, "num_beams": given.num_beams, "pad_token_id": tokenizer.pad_token_id}
    if given.do_sample:
        options |= {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    texts: list[list[str]] = []
    for start in tqdm(range(0, len(prompts), given.batch_size), desc="Writing", unit="batch", delay=1.0):
        batch = prompts[start : start + given.batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
        limit = None if is_encoder_decoder else getattr(model.config, "max_position_embeddings", None)
        if limit is not None and inputs["input_ids"].shape[1] + given.max_new_tokens > limit:
            raise DataError(
                f"A prompt of {inputs['input_ids'].shape[1]} tokens and max_new_tokens={given.max_new_tokens} are more "
                f"than the {limit} tokens the model knows. Shorten one of them. The longest is {max(batch, key=len)!r}."
            )
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=given.max_new_tokens,
                num_return_sequences=given.num_return_sequences,
                repetition_penalty=given.repetition_penalty,
                **options,
            )
        if not is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        written = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        size = given.num_return_sequences
        texts += [written[i : i + size] for i in range(0, len(written), size)]
    return texts


def main(arguments: list[str] | None = None) -> list[list[str]]:
    model_args, given = parse((ModelArguments, GenerationArguments), __doc__, arguments)
    prompts = prompts_of(given)
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args, padding_side="right" if config.is_encoder_decoder else "left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    auto_class = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    model = models.load_model(model_args, auto_class, config).eval()
    model.to(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if given.plan:
        how = "sampling" if given.do_sample else f"{given.num_beams} beams" if given.num_beams > 1 else "greedy"
        rows = [("model", f"{type(model).__name__} on {model.device}"), ("prompts", f"{len(prompts):,}")]
        print(
            plan_table([*rows, ("texts", f"{given.num_return_sequences} each, {how}, {given.max_new_tokens} tokens")])
        )
        return []
    set_seed(given.seed)
    texts = texts_after(model, tokenizer, prompts, given)
    lines = [json.dumps({"prompt": p, "texts": t}, ensure_ascii=False) for p, t in zip(prompts, texts)]
    if given.output_file:
        with open(given.output_file, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        print(f"{len(lines)} lines in {given.output_file}", file=sys.stderr)
    else:
        for prompt, several in zip(prompts, texts):
            for text in several:
                print(f"{prompt}{'' if config.is_encoder_decoder else ' '}>>> {text}\n")
    return texts


if __name__ == "__main__":
    as_script(main)
