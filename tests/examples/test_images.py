"""The image tasks on generated pictures: squares whose colour is the class, and whose place is the mask."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from tests.examples.pictures import COLOURS, picture, tiny_clip, tiny_mae, tiny_segformer, tiny_vit, write_pictures
from tests.examples.tiny import example

from trainwright.tasks.errors import DataError
from trainwright.tasks.images import MASK, read_image
from trainwright.tasks.sources import Split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("vit"))


def arguments(model, out, *more):
    return ["--model_name_or_path", str(model), "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", *more]  # fmt: skip


def test_a_folder_of_classes_is_learnt_and_predicted(vit, folder, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(
        "\n".join(json.dumps({"image": str(folder / f"photos/{c}/{n}.png")}) for n, c in enumerate(COLOURS))
    )
    script = example("image_classification")
    out = tmp_path / "out"
    metrics = script.main(
        arguments(vit, out, "--dataset_name", str(folder / "photos"), "--validation_split_percentage", "25",
                  "--do_train", "--do_eval", "--num_train_epochs", "8", "--learning_rate", "3e-3")
    )  # fmt: skip
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_samples"] == 6 and metrics["train_samples"] == 18
    script.main(arguments(out, tmp_path / "again", "--test_file", str(test), "--do_predict"))
    assert (tmp_path / "again" / "predictions.tsv").read_text() == "index\tprediction\n0\tblue\n1\tred\n"


def test_an_image_that_cannot_be_read_is_named(vit, folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [{"image": str(folder / "photos/blue/0.png"), "label": "blue"}, {"image": "broken.png", "label": "red"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = arguments(vit, tmp_path / "out", "--train_file", str(tmp_path / "train.jsonl"), "--do_train")
    with pytest.raises(ValueError, match=r"train\.jsonl, row 2 \(line 2\): no image can be read from .*broken\.png"):
        example("image_classification").main(wanted)


def test_the_plan_shows_classes_and_trains_nothing(vit, folder, tmp_path, capsys):
    wanted = ("--train_file", str(folder / "photos.jsonl"), "--do_train", "--plan")
    assert example("image_classification").main(arguments(vit, tmp_path / "out", *wanted)) == {}
    shown = capsys.readouterr().out
    assert "blue, red" in shown and "24 x 24" in shown


def test_random_parts_have_the_size_asked_for_and_depend_on_the_seed():
    from trainwright.tasks.images import random_crop

    image, _ = picture("red", 0, size=40)
    random.seed(3)
    first = np.array(random_crop(image, (24, 16)))
    random.seed(3)
    assert (np.array(random_crop(image, (24, 16))) == first).all() and first.shape == (24, 16, 3)
    assert not (np.array(random_crop(image, (24, 16))) == first).all()


def test_hidden_patches_are_predicted_better_with_training(vit, folder, tmp_path):
    metrics = example("image_pretraining").main(
        arguments(vit, tmp_path / "out", "--method", "simmim", "--mask_patch_size", "8", "--mask_ratio", "0.5",
                  "--dataset_name", str(folder / "photos"), "--validation_split_percentage", "25", "--do_train",
                  "--do_eval", "--num_train_epochs", "6", "--learning_rate", "3e-3", "--logging_steps", "1")
    )  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]) and metrics["eval_loss"] > 0


def test_masked_autoencoders_rebuild_images(folder, tmp_path):
    model = tiny_mae(tmp_path / "mae")
    metrics = example("image_pretraining").main(
        arguments(model, tmp_path / "out", "--train_file", str(folder / "photos.jsonl"), "--mask_ratio", "0.5",
                  "--validation_split_percentage", "25", "--do_train", "--do_eval", "--max_steps", "4")
    )  # fmt: skip
    assert metrics["eval_loss"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_ratio"] == 0.5


def test_a_block_mask_hides_the_share_asked_for_in_whole_blocks():
    from trainwright.tasks.masked_images import BlockMask

    mask = BlockMask(image_size=32, patch_size=4, block_size=8, ratio=0.5)()
    blocks = mask.view(4, 2, 4, 2).permute(0, 2, 1, 3).reshape(16, 4)
    assert mask.sum() == 32 and set(blocks.sum(1).tolist()) == {0, 4}
    with pytest.raises(ValueError, match="mask_patch_size=12 must divide the image"):
        BlockMask(image_size=32, patch_size=4, block_size=12)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "LA", "RGB", "RGBA"])
def test_a_mask_is_the_numbers_of_its_pixels_however_it_is_saved(mode, tmp_path):
    numbers = np.array([[0, 1], [1, 0]], np.uint8)
    image = Image.fromarray(numbers)
    if mode in ("P", "1"):  # convert() would scale these
        image = Image.new(mode, (2, 2))
        image.putdata(numbers.flatten().tolist())
        if mode == "P":
            image.putpalette([200, 30, 30, 90, 90, 250])
    elif mode == "I;16":
        image = Image.fromarray(numbers.astype(np.uint16))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    found = read_image(str(tmp_path / "mask.png"), Split("train", None, "train.csv"), 0, MASK)
    assert found.mode == "L" and (np.array(found) == numbers).all()


@pytest.mark.parametrize(
    ("pixel", "message"),
    [((200, 30, 30), r"train\.csv, row 3 \(line 4.*it has colours \(RGB\)"), (300, "it holds the number 300")],
)
def test_a_mask_of_colours_or_of_too_large_numbers_is_refused(pixel, message, tmp_path):
    Image.new("RGB" if isinstance(pixel, tuple) else "I;16", (2, 2), pixel).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=message):
        read_image(str(tmp_path / "mask.png"), Split("train", None, "train.csv"), 2, MASK)


def test_pixels_get_their_class(folder, tmp_path):
    model = tiny_segformer(tmp_path / "segformer")
    files = ("--train_file", str(folder / "photos.jsonl"), "--validation_file", str(folder / "photos.jsonl"),
             "--label_column", "mask")  # fmt: skip
    script = example("semantic_segmentation")
    with pytest.raises(ValueError, match=r"photos\.jsonl, row 1 .*class 1, but class_names has 1"):
        script.main(arguments(model, tmp_path / "a", *files, "--class_names", "ground", "--do_train"))
    metrics = script.main(
        arguments(model, tmp_path / "out", *files, "--class_names", "ground,square", "--do_train", "--do_eval",
                  "--num_train_epochs", "10", "--learning_rate", "1e-2")
    )  # fmt: skip
    assert metrics["eval_mean_iou"] > 0.7 and metrics["eval_iou_square"] > 0.6


def test_intersection_over_union_is_that_of_the_definition():
    from trainwright import EvalPrediction
    from trainwright.tasks.segments import mean_iou

    truth = np.array([[[0, 0, 1], [1, 255, 1]]])
    chosen = np.array([[[0, 1, 1], [1, 0, 0]]])
    found = mean_iou(["a", "b", "c"])(EvalPrediction(chosen, truth))
    assert found["iou_a"] == pytest.approx(1 / 3) and found["iou_b"] == pytest.approx(2 / 4)
    assert found["mean_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2) and "iou_c" not in found
    assert found["overall_accuracy"] == pytest.approx(3 / 5)
    assert found["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_images_and_texts_find_each_other(folder, tmp_path):
    model, pairs = tiny_clip(tmp_path / "clip"), str(folder / "photos.jsonl")
    metrics = example("contrastive_image_text").main(
        arguments(model, tmp_path / "out", "--train_file", pairs, "--validation_file", pairs, "--do_train", "--do_eval",
                  "--num_train_epochs", "12", "--learning_rate", "3e-3")
    )  # fmt: skip
    assert metrics["eval_image_to_text_recall_at_1"] == 1.0  # two captions: guessing finds the right one half the time
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_recall_counts_the_own_text_and_its_repetitions():
    from trainwright.tasks.contrastive import recall

    images = np.eye(4)
    found = recall(images, np.eye(4)[[0, 1, 3, 2]], at=(1, 2, 3))
    assert found["image_to_text_recall_at_1"] == found["text_to_image_recall_at_1"] == 0.5
    assert found["image_to_text_recall_at_2"] == 1.0
    same = np.eye(4)[[0, 0, 1, 1]]
    assert recall(same, same, at=(1,))["image_to_text_recall_at_1"] == 1.0
