"""Generated pictures, squares whose colour is the class and whose place is the mask, and tiny models for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}
SIZE = 24  # pixels of a side
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {f"decoder_{name}": value for name, value in TINY.items()}


def picture(colour: str, seed: int, size: int = SIZE) -> tuple[Image.Image, Image.Image]:
    """A square of `colour` on grey noise, and its mask: 1 where the square is."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(100, 130, (size, size, 3)).astype(np.uint8)
    left, top = draw.integers(0, size // 2, 2)
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + size // 2, left : left + size // 2] = 1
    pixels[mask == 1] = COLOURS[colour]
    return Image.fromarray(pixels), Image.fromarray(mask)


def write_pictures(root: Path, number: int = 24) -> Path:
    """photos/<class>/<n>.png and masks/<n>.png in `root`, and photos.jsonl with paths, classes and texts."""
    lines = []
    (root / "masks").mkdir()
    for index in range(number):
        colour = list(COLOURS)[index % 2]
        path = root / "photos" / colour / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, mask = picture(colour, index)
        image.save(path)
        mask.save(root / "masks" / f"{index}.png")
        lines.append({"image": str(path.relative_to(root)), "mask": f"masks/{index}.png", "label": colour,
                      "caption": f"a square that is {colour}"})  # fmt: skip
    (root / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def save(model: Any, directory: Path, size: int = SIZE) -> str:
    """Save `model` and an image processor for pictures of `size`."""
    model.save_pretrained(directory)
    return save_processor(directory, size)


def save_processor(directory: Path, size: int = SIZE) -> str:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(directory)
    return str(directory)


def tiny_vit(directory: Path) -> str:
    """A ViT without a head."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return save(ViTModel(ViTConfig(**TINY, image_size=SIZE, patch_size=8, encoder_stride=8)), directory)


def tiny_mae(directory: Path) -> str:
    """A masked autoencoder."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    return save(ViTMAEForPreTraining(ViTMAEConfig(**TINY, **DECODER, image_size=SIZE, patch_size=8)), directory)


def tiny_segformer(directory: Path) -> str:
    """A model for masks whose head was trained for no classes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[16, 32],
                             patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
                             decoder_hidden_size=32)  # fmt: skip
    return save(SegformerForSemanticSegmentation(config), directory)


def tiny_clip(directory: Path) -> str:
    """A CLIP and the tokenizer of the texts of `write_pictures`."""
    from tests.examples.tiny import words_tokenizer
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tokenizer: Any = words_tokenizer(["a square that is", *COLOURS], directory, bos_token="[CLS]", eos_token="[SEP]")
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = CLIPConfig(
        text_config=text, vision_config={**TINY, "image_size": SIZE, "patch_size": 8}, projection_dim=16
    )
    return save(CLIPModel(config), directory)
