"""Images and texts that find each other, from files to a trained model: CLIP, or two encoders side by side.

Owns: the order of its parts, which encoder stays as it is. Leaves to others: batches and recall (`contrastive.py`),
reading and varying images (`images.py`), the arguments (`image_arguments.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainwright.args.training import TrainingArguments
from trainwright.tasks import checks, images, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.contrastive import ContrastiveTrainer, PairCollator
from trainwright.tasks.image_arguments import CaptionDataArguments

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = "AutoModel"


def run(model_args: TrainedModelArguments, data: CaptionDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args, "PIL")
    splits = sources.load_splits(data, needs=session.needed_splits(args), shuffled=True)
    image = images.image_column(splits, data.image_column, ("image", "image_path", "img"))
    usual = ("caption", "text")
    caption = checks.shared_column(splits.values(), "caption_column", data.caption_column, usual, "the text")
    for split in splits.values():
        checks.check_filled(split, caption)
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args)
    models.fit_vocabulary(model_args, config, tokenizer)
    processor, size = images.load_processor(model_args, config)
    model = models.load_with_adapter(model_args, HEAD, config)
    for part, frozen in (("vision_model", data.freeze_vision_model), ("text_model", data.freeze_text_model)):
        if frozen:
            getattr(model, part).requires_grad_(False)

    def rows(name: str) -> images.ImageRows:
        def prepare(picture: Image) -> dict[str, torch.Tensor]:
            scale = (0.7, 1.0)  # most of the image: a small part of it need not be what the text says
            picture = images.random_crop(picture, size, scale) if name == "train" else picture
            return {"pixel_values": images.pixels(processor, picture)}

        texts = [{"text": text} for text in splits[name].rows[caption]]
        return images.ImageRows(splits[name], {image: "RGB"}, prepare, texts)

    ready = {name: rows(name) for name in splits}
    args.remove_unused_columns = False  # "text" becomes tokens in the collator
    args.dataloader_drop_last = True  # the loss compares the pairs of a batch: a batch of one would compare nothing
    trainer = ContrastiveTrainer(
        model,
        args,
        PairCollator(tokenizer, min(data.max_seq_length, tokenizer.model_max_length)),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=models.Processors(processor, tokenizer),
    )
    return session.run(
        trainer,
        data,
        task="zero-shot-image-classification",
        predict_dataset=ready.get("test"),
        plan_rows=[("image", f"{size[0]} x {size[1]}"), ("texts", caption)],
    )
