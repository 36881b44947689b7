"""The model card of a run."""

import re

import pytest
import yaml

from trainwright.hub.model_card import MARK, TrainingSummary, results_table, write_model_card

HISTORY = [
    {"loss": 1.5, "learning_rate": 1e-5, "epoch": 0.5, "step": 1},
    {"loss": 1.25, "learning_rate": 5e-6, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.0, "eval_f1": 0.5, "eval_runtime": 3.0, "eval_samples_per_second": 9.0, "epoch": 1.0, "step": 2},
    {"eval_loss": 0.75, "eval_f1": 0.625, "eval_runtime": 3.0, "epoch": 2.0, "step": 4},
    {"train_runtime": 9.0, "train_loss": 1.25, "total_flos": 1.0, "epoch": 2.0, "step": 4},
]


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_header_carries_what_was_said_about_the_run():
    summary = TrainingSummary(
        "my-model",
        language="en",
        license="apache-2.0",
        tags=["demo", "generated_from_trainer"],
        finetuned_from="org/base",
        tasks="text-classification",
        dataset="GLUE MRPC",
        dataset_tags="glue",
        dataset_args="mrpc",
        log_history=HISTORY,
    )
    f1 = {"name": "F1", "type": "f1", "value": 0.625}
    assert header_of(summary.to_model_card()) == {
        "library_name": "transformers",
        "language": ["en"],
        "license": "apache-2.0",
        "base_model": "org/base",
        "tags": ["demo", "generated_from_trainer"],
        "datasets": ["glue"],
        "metrics": ["f1"],
        "model-index": [
            {
                "name": "my-model",
                "results": [
                    {
                        "task": {"name": "Text Classification", "type": "text-classification"},
                        "dataset": {"name": "GLUE MRPC", "type": "glue", "args": "mrpc"},
                        "metrics": [f1],
                    }
                ],
            }
        ],
    }


def test_what_was_not_said_is_not_in_the_header():
    header = header_of(TrainingSummary("m").to_model_card())
    assert set(header) == {"library_name", "tags", "model-index"}


def test_the_table_has_one_row_for_each_evaluation_with_the_training_loss_before_it():
    head, rule, *rows = results_table(HISTORY).splitlines()
    assert cells(head) == ["Training loss", "Epoch", "Step", "Validation loss", "F1"]
    assert set(rule) == {"|", "-", ":"}
    assert [cells(row) for row in rows] == [
        ["1.2500", "1.0000", "2", "1.0000", "0.5000"],
        ["1.2500", "2.0000", "4", "0.7500", "0.6250"],
    ]


def test_an_evaluation_before_the_first_log_line_says_that_no_loss_was_logged():
    assert cells(results_table(HISTORY[2:3]).splitlines()[2])[0] == "not logged"


def test_metrics_of_several_evaluation_sets_share_one_table():
    history = [{"eval_a_loss": 1.0, "epoch": 1.0, "step": 2}, {"eval_b_loss": 2.0, "epoch": 1.0, "step": 2}]
    head, _, *rows = results_table(history).splitlines()
    assert cells(head) == ["Training loss", "Epoch", "Step", "A Loss", "B Loss"]
    assert [cells(row)[3:] for row in rows] == [["1.0000", ""], ["", "2.0000"]]


def test_without_evaluations_there_is_no_table():
    assert results_table(HISTORY[:2]) == ""
    assert "Results during training" not in TrainingSummary("m", log_history=HISTORY[:2]).to_model_card()


def test_the_text_names_base_data_results_hyper_parameters_and_versions():
    card = TrainingSummary(
        "m",
        finetuned_from="org/base",
        dataset="GLUE",
        hyperparameters={"learning_rate": 1e-5, "seed": 42},
        eval_metrics={"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 2.0},
        framework_versions={"torch": "2.13.0"},
    ).to_model_card()
    for line in (
        "Fine-tuned from [org/base](https://huggingface.co/org/base) on GLUE.",
        "- Loss: 0.5000",
        "- Accuracy: 0.7500",
        "- learning_rate: 1e-05",
        "- seed: 42",
        "- torch 2.13.0",
    ):
        assert line in card.splitlines()
    assert "runtime" not in card.lower()


@pytest.mark.parametrize("as_directory", [True, False])
def test_a_card_of_an_earlier_push_is_replaced(tmp_path, as_directory):
    path = tmp_path if as_directory else tmp_path / "README.md"
    assert write_model_card(path, model_name="first")
    assert write_model_card(path, model_name="second")
    text = (tmp_path / "README.md").read_text()
    assert "# second" in text and "# first" not in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


def test_a_card_whose_mark_a_person_removed_stays_as_it_is(tmp_path):
    readme = tmp_path / "README.md"
    write_model_card(readme, model_name="m")
    edited = "\n".join(line for line in readme.read_text().splitlines() if not line.startswith(MARK)) + "\nMine."
    readme.write_text(edited)
    assert not write_model_card(readme, model_name="m")
    assert readme.read_text() == edited


def test_the_template_that_peft_leaves_is_replaced(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n")
    assert write_model_card(tmp_path, model_name="m", library_name="peft")
    assert header_of((tmp_path / "README.md").read_text())["library_name"] == "peft"


def test_a_metric_with_a_bar_or_a_line_end_in_its_name_or_value_keeps_the_table_whole():
    history = [{"eval_loss": 1.0, "eval_f1|macro": 0.5, "eval_note": "a|b\nc", "epoch": 1.0, "step": 2}]
    head, rule, row = results_table(history).splitlines()
    columns = ["Training loss", "Epoch", "Step", "Validation loss", r"F1\|macro", "Note"]
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", head)[1:-1]] == columns
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]][-2:] == ["0.5000", r"a\|b c"]
    assert len(rule.strip("|").split("|")) == len(columns) and len(head) == len(rule) == len(row)


def test_no_value_of_the_card_ends_its_line_or_its_header():
    text = "a|b: 'c'\n---\n# d\u2028e"
    summary = TrainingSummary(
        text, language=text, license=text, tags=[text], finetuned_from=text, tasks=text, dataset=text,
        dataset_tags=text, dataset_args=text,
        log_history=[{"eval_loss": 1.0, f"eval_{text}": text, "epoch": 1.0, "step": 2}],
        hyperparameters={text: text}, framework_versions={text: text},
    )  # fmt: skip
    card = summary.to_model_card()
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    found = yaml.safe_load(header)
    assert [found["license"], *found["tags"][:1], *found["datasets"]] == [text] * 3
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": text, "type": text, "args": text}
    assert next(line for line in body.splitlines() if line.startswith("#")).startswith(r"# a\|b: 'c' --- # d e")
    assert not any(line.startswith(("---", "# d")) for line in body.splitlines())


HOSTILE = {
    "markup": "*a* [b](c) `d` ~~e~~ $f$ _g_ \\h",
    "a cell": "a|b",
    "html": "<img src=x> &lt; &#60;",
    "a heading": "# not a heading",
    "a list": "- no item",
    "a number": "1. no item",
    "a line": "two\nlines",
    "not printed": "bell\x07 turned\u202e zero\u200b",
    "half a pair": "half\ud800",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_body_of_a_card_shows_text_of_others_as_text(text, tmp_path):
    """Rendered by a real reader of Markdown, each text is one run of text again, wherever it came from."""
    markdown = pytest.importorskip("markdown_it")
    from html.parser import HTMLParser

    log = [
        {"loss": 1.0, "step": 1},
        {"eval_loss": 0.5, f"eval_{text}": 1.0, "eval_note": text, "step": 1, "epoch": 1.0},
    ]
    assert write_model_card(
        tmp_path,
        model_name=text,
        dataset=[text, "plain_name"],
        finetuned_from=text,
        hyperparameters={text: text},
        log_history=log,
        framework_versions={text: "1.0"},
    )
    body = (tmp_path / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    rendered = markdown.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)

    class Reader(HTMLParser):
        tags, texts = [], []

        def handle_starttag(self, tag, attributes):
            self.tags = [*self.tags, tag]

        def handle_data(self, data):
            self.texts = [*self.texts, data]

    reader = Reader()
    reader.feed(rendered)
    shown = "".join(reader.texts)
    wanted = "".join(c if c.isprintable() else f"(U+{ord(c):04X})" for c in " ".join(text.split()))
    assert shown.count(wanted) >= 6  # the title, the base, a data set, name and value of a setting, a version
    assert not {"em", "strong", "code", "del", "s", "h4"} & set(reader.tags)
    assert reader.tags.count("img") == 1  # that of the curves
    assert reader.tags.count("h1") == 1 and reader.tags.count("a") == 1 and reader.tags.count("table") == 1
    lengths = {len(re.split(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")}
    assert len(lengths) == 1


def test_usual_names_are_not_escaped():
    card = TrainingSummary(
        model_name="bert-base_v1.0", hyperparameters={"learning_rate": 5e-05, "optim": "adamw_torch (betas 0.9, 1e-08)"}
    ).to_model_card()
    assert "# bert-base_v1.0\n" in card
    assert "- learning_rate: 5e-05\n- optim: adamw_torch (betas 0.9, 1e-08)\n" in card


# -- the image of the curves -------------------------------------------------------------------------------------------


def test_a_card_shows_the_curves_from_a_file_next_to_it(tmp_path):
    import xml.etree.ElementTree as ElementTree

    markdown = pytest.importorskip("markdown_it")
    assert write_model_card(tmp_path / "README.md", model_name="m", log_history=HISTORY)
    card = (tmp_path / "README.md").read_text()
    rendered = markdown.MarkdownIt("commonmark").render(card.split("\n---\n", 1)[1])
    (source,) = re.findall(r'<img src="([^"]+)" alt="[^"]+"', rendered)
    drawing = ElementTree.fromstring((tmp_path / source).read_text())
    labels = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss", "Training loss", "Validation loss", "F1"} <= set(labels) and "Learning rate" not in labels


def test_a_card_of_a_run_that_logged_nothing_has_no_image(tmp_path):
    assert write_model_card(tmp_path, model_name="m", log_history=[{"train_runtime": 1.0, "step": 2}])
    assert "![" not in (tmp_path / "README.md").read_text() and len(list(tmp_path.iterdir())) == 1


def test_the_image_of_a_card_that_a_person_edited_stays_current(tmp_path):
    write_model_card(tmp_path, model_name="m", log_history=HISTORY[:2])
    (tmp_path / "README.md").write_text("Mine: ![](training_curves.svg)")
    before = (tmp_path / "training_curves.svg").read_text()
    assert not write_model_card(tmp_path, model_name="m", log_history=HISTORY)
    assert (tmp_path / "README.md").read_text() == "Mine: ![](training_curves.svg)"
    assert (tmp_path / "training_curves.svg").read_text() != before
    (tmp_path / "training_curves.svg").unlink()
    assert not write_model_card(tmp_path, model_name="m", log_history=HISTORY)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_reader_of_huggingface_hub_understands_the_header(text, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    log = [{"loss": 1.0, "step": 1}, {"eval_loss": 0.5, f"eval_{text}": 1.0, "step": 1, "epoch": 1.0}]
    write_model_card(
        tmp_path, model_name=text, tags=[text], dataset=text, dataset_tags=text, dataset_args=text, tasks=text,
        log_history=log, hyperparameters={text: text}, language="en", license="mit",
    )  # fmt: skip
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.tags[0] == text.encode("utf-8", "backslashreplace").decode() or card.data.tags[0] == text
    (result,) = [result for result in card.data.eval_results or [] if result.metric_value == 1.0]
    assert result.metric_type and result.dataset_name
