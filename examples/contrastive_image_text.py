"""Teach images and texts to find each other (CLIP, or a vision and a text encoder side by side).

    python examples/contrastive_image_text.py --model_name_or_path openai/clip-vit-base-patch32 \
        --train_file captions.jsonl --validation_split_percentage 10 --do_train --do_eval --output_dir out
    python examples/contrastive_image_text.py --model_name_or_path my-clip --dataset_name my-dataset \
        --caption_column caption --do_train --output_dir out
    python examples/contrastive_image_text.py settings.yaml --plan

Data: csv or jsonl with a path in "image" (relative to the file; or "image_path") and a text in "caption" or "text", or
a data set with such columns. Metrics: the loss, and recall: how often an image finds its text, and a text its image.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright import TrainingArguments
from trainwright.args.options import option
from trainwright.tasks import checks, images, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.contrastive import ContrastiveTrainer, PairCollator
from trainwright.tasks.errors import as_script


@dataclass
class CaptionDataArguments(DataArguments):
    """The images and their texts."""

    image_column: str | None = option(None, "Column of the image. None: image, image_path or img.")
    caption_column: str | None = option(None, "Column of the text. None: caption or text.")
    max_seq_length: int = option(77, "Tokens of a text; the rest is cut off.")
    freeze_vision_model: bool = option(False, "Leave the vision encoder as it is.")
    freeze_text_model: bool = option(False, "Leave the text encoder as it is.")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, CaptionDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args, "PIL")
    splits = sources.load_splits(data, needs=session.needed_splits(args), shuffled=True)
    first = next(iter(splits.values()))
    usual = ("image", "image_path", "img")
    image = checks.pick_column(first, "image_column", data.image_column, usual, "the image")
    caption = checks.pick_column(first, "caption_column", data.caption_column, ("caption", "text"), "the text")
    checks.require_columns(splits.values(), [image, caption])
    for split in splits.values():
        checks.check_filled(split, caption)
    tokenizer = models.load_processor(model_args)
    processor = models.load_processor(model_args, "AutoImageProcessor")
    model = models.load_model(model_args, "AutoModel", models.load_config(model_args))
    for part, frozen in (("vision_model", data.freeze_vision_model), ("text_model", data.freeze_text_model)):
        if frozen:
            getattr(model, part).requires_grad_(False)
    size = images.size_of(processor)

    def rows(name: str) -> images.ImageRows | None:
        def prepare(picture: object) -> dict[str, object]:
            scale = (0.7, 1.0)  # most of the image: a small part of it need not be what the text says
            picture = images.random_crop(picture, size, scale) if name == "train" else picture
            return {"pixel_values": images.pixels(processor, picture)}

        if name not in splits:
            return None
        return images.ImageRows(
            splits[name], {image: "RGB"}, prepare, [{"text": t} for t in splits[name].rows[caption]]
        )

    args.remove_unused_columns = False  # "text" becomes tokens in the collator
    args.dataloader_drop_last = True  # the loss compares the pairs of a batch: a batch of one would compare nothing
    test = rows("test")
    trainer = ContrastiveTrainer(
        model,
        args,
        PairCollator(tokenizer, min(data.max_seq_length, tokenizer.model_max_length)),
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=processor,
    )
    metrics = session.run(trainer, data, task="zero-shot-image-classification", predict_dataset=test)
    if args.do_train and not data.plan and trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.output_dir)
    return metrics


if __name__ == "__main__":
    as_script(main)
