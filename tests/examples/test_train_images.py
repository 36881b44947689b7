"""`trainwright train FILE` on pictures, driven as a user would: what each task learns, leaves, adapts and refuses."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.examples.pictures import (
    COLOURS,
    DECODER,
    SIZE,
    TINY,
    picture,
    save_processor,
    tiny_clip,
    tiny_mae,
    tiny_segformer,
    tiny_vit,
    write_pictures,
)

from trainwright.cli import main

TRAINING = {
    "output_dir": "out",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
}
MODELS = {"vit": tiny_vit, "mae": tiny_mae, "segformer": tiny_segformer, "clip": tiny_clip}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, and a directory for each of MODELS."""
    root = write_pictures(tmp_path_factory.mktemp("made"))
    for name, make in MODELS.items():
        make(root / name)
    return root


@pytest.fixture(autouse=True)
def here(made, tmp_path, monkeypatch):
    """The current folder, in which `made` is seen and nothing else."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, task, model, data, **training):
    """A file that trains `model` (a name, or options), without `training` for two epochs."""
    model = model if isinstance(model, dict) else {"path": model}
    training = {**TRAINING, "num_train_epochs": 2, **training}
    path.write_text(yaml.safe_dump({"task": task, "model": model, "data": data, "training": training}))
    return str(path)


def read(path):
    return json.loads(path.read_text())


def files(tmp_path, task):
    """A file for `task` with a saved model, two updates long."""
    model = {"image_classification": "vit", "image_pretraining": "mae", "semantic_segmentation": "segformer",
             "contrastive_image_text": "clip"}[task]  # fmt: skip
    data = {"train_file": "photos.jsonl", "validation_file": "photos.jsonl"}
    if task == "semantic_segmentation":
        data |= {"label_column": "mask", "class_names": "ground, square"}
    return write(tmp_path / "a.yaml", task, model, data, max_steps=2)


TASKS = ("image_classification", "image_pretraining", "semantic_segmentation", "contrastive_image_text")


def test_a_folder_of_parts_is_trained_on_evaluated_and_labelled(here, capsys):
    for number in range(24):
        colour = list(COLOURS)[number % 2]
        part = "test" if number < 4 else "valid" if number < 8 else "train"
        path = here / "parts" / part / ("" if part == "test" else colour) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colour, number)[0].save(path)
    file = write(here / "a.yaml", "image_classification", "vit", {"name": "parts"}, num_train_epochs=8)
    assert main(["plan", "--json", file]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["train", file]) == 0
    results = read(here / "out" / "all_results.json")
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (16, 4, 4)
    assert results["eval_accuracy"] == 1.0
    predicted = (here / "out" / "predictions.tsv").read_text().splitlines()
    assert predicted == ["index\tprediction", *(f"{number}\t{list(COLOURS)[number % 2]}" for number in range(4))]


def test_a_new_autoencoder_has_the_image_size_of_its_processor(here):
    save_processor(here / "processor")
    new = {"config": {"model_type": "vit_mae", "patch_size": 8, **TINY, **DECODER}, "tokenizer": "processor"}
    data = {"name": "photos", "validation_split_percentage": 25, "mask_ratio": 0.5}
    assert main(["train", write(here / "a.yaml", "image_pretraining", new, data)]) == 0
    saved = read(here / "out" / "config.json")
    assert (saved["image_size"], saved["mask_ratio"], saved["hidden_size"]) == (SIZE, 0.5, TINY["hidden_size"])
    results = read(here / "out" / "all_results.json")
    assert (results["train_samples"], results["eval_samples"]) == (18, 6) and results["eval_loss"] > 0


def test_masks_with_a_palette_are_learnt_by_their_numbers_and_not_their_colours(here):
    lines = []
    for number in range(8):
        image, mask = picture("red", number)
        coloured = Image.new("P", mask.size)
        coloured.putdata(np.array(mask).flatten().tolist())
        coloured.putpalette([200, 30, 30, 90, 90, 250])
        image.save(here / f"{number}.png")
        coloured.save(here / f"{number}.mask.png")
        lines.append({"image": f"{number}.png", "label": f"{number}.mask.png"})
    (here / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"train_file": "train.jsonl", "validation_file": "train.jsonl", "test_file": "train.jsonl"}
    file = write(here / "a.yaml", "semantic_segmentation", "segformer", data, num_train_epochs=30, learning_rate=1e-2)
    assert main(["train", file]) == 0
    results = read(here / "out" / "all_results.json")
    assert results["eval_mean_iou"] > 0.7 and results["predict_mean_iou"] == results["eval_mean_iou"]
    assert read(here / "out" / "config.json")["id2label"] == {"0": "0", "1": "1"}


def test_a_new_clip_fits_its_tokenizer_and_processor_and_finds_pairs(here, capsys):
    from transformers import AutoTokenizer

    parts = {"text_config": {**TINY, "max_position_embeddings": 16}, "vision_config": {**TINY, "patch_size": 8}}
    new = {"config": {"model_type": "clip", "projection_dim": 16, **parts}, "tokenizer": "clip"}
    data = {"train_file": "photos.jsonl", "validation_file": "photos.jsonl"}
    file = write(here / "a.yaml", "contrastive_image_text", new, data, num_train_epochs=12)
    assert main(["plan", file]) == 0
    assert main(["train", file]) == 0
    saved, tokenizer = read(here / "out" / "config.json"), AutoTokenizer.from_pretrained("out")
    assert saved["text_config"]["vocab_size"] == len(tokenizer) and saved["vision_config"]["image_size"] == SIZE
    assert saved["text_config"]["eos_token_id"] == tokenizer.eos_token_id
    # Two different texts: guessing finds the right one half the time.
    assert read(here / "out" / "all_results.json")["eval_image_to_text_recall_at_1"] == 1.0


@pytest.mark.parametrize(
    ("task", "wholes"),
    [
        ("image_classification", {"classifier"}),
        ("image_pretraining", {"decoder"}),
        ("semantic_segmentation", {"decode_head"}),
        ("contrastive_image_text", set()),
    ],
)
def test_an_adapter_is_trained_with_the_head_that_may_be_new(here, task, wholes):
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    assert main(["train", files(here, task), "--lora.r", "2", "--lora.target_modules", "all-linear"]) == 0
    assert not (here / "out" / "model.safetensors").exists()
    names = [name.removeprefix("base_model.model.") for name in load_file(here / "out" / "adapter_model.safetensors")]
    assert {name.split(".")[0] for name in names if ".lora_" not in name} == wholes
    assert any(".lora_A." in name for name in names)
    assert not any(".lora_" in name for name in names if name.split(".")[0] in wholes)
    results = read(here / "out" / "all_results.json")
    assert results["eval_loss"] > 0 and np.isfinite(results["train_loss"])


def test_an_encoder_that_is_frozen_gets_no_adapter_that_learns(here):
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    words = ["--lora.target_modules", "[q_proj]", "--data.freeze_vision_model", "true"]
    assert main(["train", files(here, "contrastive_image_text"), *words]) == 0
    saved = load_file(here / "out" / "adapter_model.safetensors")
    learnt = {name.split(".")[2]: bool(value.any()) for name, value in saved.items() if ".lora_B." in name}
    assert learnt == {"vision_model": False, "text_model": True}  # B begins as zeros


def test_an_adapter_of_a_model_whose_head_is_unknown_is_one_clear_error():
    pytest.importorskip("peft")
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    from trainwright.tasks.arguments import TrainedModelArguments
    from trainwright.tasks.errors import DataError
    from trainwright.tasks.models import with_adapter

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
                            out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_channels=8))
    wanted = {"target_modules": ["classifier"]}
    message = r"which layers of a UperNetForSemanticSegmentation are its head.* Name them in lora\.modules_to_save"
    with pytest.raises(DataError, match=message):
        with_adapter(TrainedModelArguments("x", lora=wanted), model, "AutoModelForSemanticSegmentation")


def broken(here):
    (here / "broken.png").write_bytes(b"no image")
    lines = [{"image": f"photos/blue/{number}.png", "label": str(number)} for number in (0, 2, 4, 6)]
    lines[1]["image"] = "broken.png"
    (here / "broken.jsonl").write_text("\n".join(map(json.dumps, lines)))


def coloured(here):
    Image.new("RGB", (SIZE, SIZE), (250, 30, 30)).save(here / "coloured.png")
    (here / "coloured.jsonl").write_text(json.dumps({"image": "photos/blue/0.png", "mask": "coloured.png"}))


def nothing(here):
    shutil.rmtree(here / "empty", ignore_errors=True)
    (here / "empty").mkdir()


@pytest.mark.parametrize(
    ("task", "words", "message", "prepare"),
    [
        (
            "image_classification",
            ["--data", "{name: empty}"],
            "empty holds no file that ends in one of ['.png', '.jpg',",
            nothing,
        ),
        (
            "image_classification",
            ["--data", "{train_file: photos}"],
            "train_file='photos' is a directory. Give a file, or the directory as data.name.",
            None,
        ),
        (
            "image_classification",
            ["--data", "{train_file: photos.jsonl, image_column: picture}"],
            "photos.jsonl has no column 'picture' (image_column, the image)",
            None,
        ),
        (
            "image_classification",
            ["--data", "{train_file: broken.jsonl}", "--training.dataloader_num_workers", "1"],
            "broken.jsonl, row 2 (line 2): no image can be read from ",
            broken,
        ),
        (
            "image_classification",
            ["--model.path", "clip", "--training.max_steps", "1", "--model.tokenizer", "tokenizer"],
            "tokenizer holds no preprocessor_config.json that can be read",
            lambda here: (here / "tokenizer").mkdir(),
        ),
        (
            "image_pretraining",
            ["--data.method", "simmim", "--data.mask_patch_size", "8"],
            "A vit_mae is no model for this task: transformers has no AutoModelForMaskedImageModeling of it.",
            None,
        ),
        (
            "image_pretraining",
            ["--model.path", "vit"],
            "method='mae' leaves hiding patches to the model, and a vit cannot: it has no mask_ratio. Take a masked "
            "autoencoder, such as facebook/vit-mae-base, or data.method simmim.",
            None,
        ),
        (
            "image_pretraining",
            ["--model.path", "vit", "--data.method", "simmim", "--data.mask_patch_size", "10"],
            "mask_patch_size=10 must divide the image (24) and be a multiple of the model's patches (8).",
            None,
        ),
        (
            "semantic_segmentation",
            ["--data.class_names", "ground"],
            "photos.jsonl, row 1 (line 1): the mask holds class 1, but class_names has 1: ['ground'].",
            None,
        ),
        (
            "semantic_segmentation",
            ["--data.train_file", "coloured.jsonl"],
            "coloured.jsonl, row 1 (line 1): no image can be read from 'coloured.png': it has colours (RGB), and a "
            "mask has the number of its class in each pixel.",
            coloured,
        ),
        (
            "contrastive_image_text",
            ["--data.caption_column", "captions"],
            "photos.jsonl has no column 'captions' (caption_column, the text)",
            None,
        ),
        (
            "contrastive_image_text",
            ["--lora.target_modules", "[query]"],
            "lora={'target_modules': ['query']} does not fit this model: ",
            None,
        ),
    ],
)
def test_pictures_or_a_model_that_do_not_fit_end_with_2_and_one_line(here, task, words, message, prepare, capsys):
    if prepare is not None:
        prepare(here)
    assert main(["train", files(here, task), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trainwright train: ") and message in line
