"""`trainwright train FILE` of questions and sounds, driven as a user would on tiny data: what it learns and refuses."""

import json

import pytest
import yaml
from safetensors import safe_open
from tests.examples.tiny import tiny_bert
from tests.examples.tones import PITCHES, SMALL, save_extractor, save_wav2vec2, write_tone, write_tunes, write_words

from trainwright.cli import main
from trainwright.tasks import models
from trainwright.tasks.arguments import TrainedModelArguments

TRAINING = {
    "output_dir": "out",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
}
COLOURS = ["red", "blue", "green"]
PLACES = ["rome", "paris", "oslo"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return json.loads(path.read_text())


def choices(number):
    """Questions whose right answer is the word that only right answers hold."""
    for index in range(number):
        answers = [COLOURS[(index + shift) % 3] for shift in range(3)]
        answers[index % 3] = "yes"
        yield {"context": f"the door is {COLOURS[index % 3]}", "choices": answers, "label": index % 3}


def questions(number):
    for index in range(number):
        place = PLACES[index % 3]
        yield {
            "id": f"q{index}",
            "question": "where",
            "context": f"now anna lives in {place} and is fine",
            "answer": place,
        }


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    """A function that makes data and a model of a task in the current folder, and a file that trains with them."""
    monkeypatch.chdir(tmp_path)

    def multiple_choice():
        write_lines(tmp_path / "train.jsonl", choices(24))
        tiny_bert(tmp_path / "bert", ["the door is yes", *COLOURS])
        return {"path": "bert"}, {f"{part}_file": "train.jsonl" for part in ("train", "validation", "test")}

    def question_answering():
        write_lines(tmp_path / "train.jsonl", questions(24))
        tiny_bert(tmp_path / "bert", ["where", *(row["context"] for row in questions(3))])
        files = {f"{part}_file": "train.jsonl" for part in ("train", "validation", "test")}
        return {"path": "bert"}, {**files, "max_seq_length": 24, "doc_stride": 4}

    def audio_classification():
        for number in range(12):
            name = list(PITCHES)[number % 2]
            for part in ("train", "valid"):
                write_tone(tmp_path / "sounds" / part / name / f"{number}.wav", [PITCHES[name]])
        for name in PITCHES:
            write_tone(tmp_path / "sounds" / "test" / f"{name}.wav", [PITCHES[name]])
        save_extractor(tmp_path / "extractor")
        config = {"model_type": "wav2vec2", **SMALL}
        data = {"name": "sounds", "max_length_seconds": 0.2, "freeze_feature_encoder": False}
        return {"config": config, "tokenizer": "extractor"}, data

    def speech_recognition():
        write_words(tmp_path, 8)
        save_wav2vec2(tmp_path / "wav2vec2")
        return {"path": "wav2vec2"}, {f"{part}_file": "words.jsonl" for part in ("train", "validation", "test")}

    def speech_pretraining():
        write_tunes(tmp_path / "tunes", 10)
        save_extractor(tmp_path / "extractor")
        config = {"model_type": "wav2vec2", **SMALL, "feat_extract_norm": "layer"}
        data = {
            "name": "tunes",
            "validation_split_percentage": 20,
            "mask_time_length": 2,
            "min_duration_in_seconds": 0.1,
        }
        return {"config": config, "tokenizer": "extractor"}, data

    def make(task, **training):
        kinds = (multiple_choice, question_answering, audio_classification, speech_recognition, speech_pretraining)
        model, data = next(kind for kind in kinds if kind.__name__ == task)()
        sections = {"task": task, "model": model, "data": data, "training": {**TRAINING, **training}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
        return "config.yaml"

    return make


def test_the_right_one_of_several_answers_is_learnt_and_its_number_written(file_of, tmp_path):
    assert main(["train", file_of("multiple_choice", num_train_epochs=8)]) == 0
    assert read(tmp_path / "out" / "all_results.json")["eval_accuracy"] == 1.0
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert lines == [str(index % 3) for index in range(24)]


def test_the_place_of_an_answer_is_learnt_and_answers_written_by_question(file_of, tmp_path):
    assert main(["train", file_of("question_answering", num_train_epochs=10)]) == 0
    results = read(tmp_path / "out" / "all_results.json")
    assert results["eval_exact_match"] == results["eval_f1"] == 100.0
    expected = {row["id"]: row["answer"] for row in questions(24)}
    assert read(tmp_path / "out" / "predictions.json") == expected


def test_a_new_model_classifies_a_folder_of_sounds_whose_parts_are_evaluated_and_predicted(file_of, tmp_path):
    assert main(["train", file_of("audio_classification", max_steps=3)]) == 0
    results, config = read(tmp_path / "out" / "all_results.json"), read(tmp_path / "out" / "config.json")
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (12, 12, 2)
    assert 0 <= results["eval_accuracy"] <= 1
    assert config["label2id"] == {"high": 0, "low": 1} and config["hidden_size"] == SMALL["hidden_size"]
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and {line.split("\t")[1] for line in lines[1:]} <= set(PITCHES)
    assert len(lines) == 3


def test_recordings_are_written_down_and_every_checkpoint_has_the_alphabet(file_of, tmp_path, capsys):
    pytest.importorskip("jiwer", reason="pip install jiwer")
    file = file_of("speech_recognition", max_steps=2, save_steps=1, save_strategy="steps")
    assert main(["plan", "--json", file]) == 0
    assert json.loads(capsys.readouterr().out) and not (tmp_path / "out").exists()
    assert main(["train", file]) == 0
    letters = read(tmp_path / "out" / "vocab.json")
    assert set("highlow|") <= set(letters) and "!" not in letters
    assert read(tmp_path / "out" / "checkpoint-1" / "vocab.json") == letters
    assert read(tmp_path / "out" / "config.json")["pad_token_id"] == letters["[PAD]"]
    assert {"eval_wer", "eval_cer"} <= read(tmp_path / "out" / "all_results.json").keys()
    assert len((tmp_path / "out" / "predictions.txt").read_text().splitlines()) == 8


def test_a_new_speech_model_learns_from_recordings_alone(file_of, tmp_path):
    assert main(["train", file_of("speech_pretraining", num_train_epochs=20, learning_rate=3e-3)]) == 0
    history = read(tmp_path / "out" / "trainer_state.json")["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert read(tmp_path / "out" / "all_results.json")["eval_samples"] == 2
    assert read(tmp_path / "out" / "config.json")["architectures"] == ["Wav2Vec2ForPreTraining"]


@pytest.mark.parametrize(
    ("task", "head"),
    [("multiple_choice", "classifier"), ("question_answering", "qa_outputs"), ("speech_recognition", "lm_head")],
)
def test_an_adapter_is_saved_with_the_new_head(task, head, file_of, tmp_path):
    pytest.importorskip("peft")
    words = ["--lora.r", "2", "--lora.target_modules", "all-linear", "--training.do_predict", "false"]
    assert main(["train", file_of(task, max_steps=1), *words]) == 0
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as saved:
        names = list(saved.keys())
    assert any(name.endswith(f"{head}.weight") for name in names)
    assert any("lora_A" in name for name in names) and not any("lora_A" in name and head in name for name in names)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("auto_class", "kind", "heads"),
    [
        ("AutoModelForTokenClassification", "bert", {"classifier"}),
        ("AutoModelForSequenceClassification", "distilbert", {"pre_classifier", "classifier"}),
        ("AutoModelForAudioClassification", "wav2vec2", {"projector", "classifier"}),
        ("XLNetForQuestionAnswering", "xlnet", {"start_logits", "end_logits", "answer_class"}),
        ("AutoModelForMaskedLM", "bert", set()),  # tied to the embeddings, and so not new
    ],
)
def test_an_adapter_of_every_linear_layer_leaves_new_heads_whole(auto_class, kind, heads):
    pytest.importorskip("peft")
    import transformers

    sizes = {
        "bert": {"num_hidden_layers": 1},
        "distilbert": {"n_layers": 1},
        "xlnet": {"n_layer": 1},
        "wav2vec2": SMALL,
    }
    config = transformers.AutoConfig.for_model(kind, **sizes[kind], vocab_size=32)
    cls = getattr(transformers, auto_class)
    plain = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    arguments = TrainedModelArguments(model_name_or_path="x", lora={"r": 2, "target_modules": "all-linear"})
    made = models.with_adapter(arguments, plain, auto_class)
    trained = [name for name, weight in made.named_parameters() if weight.requires_grad]
    assert {name.split(".")[2] for name in trained if "lora_" not in name} == heads
    assert any("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (
            "multiple_choice",
            ["--data.context_column", "contxt"],
            "train.jsonl has no column 'contxt' (context_column, the context); it has ['context', 'choices', 'label']."
            " Did you mean 'context'?",
        ),
        (
            "question_answering",
            ["--data.beam_search"],
            "beam_search needs one of ['xlnet', 'xlm']; this model is a bert.",
        ),
        (
            "audio_classification",
            ["--data.audio_column", "sound"],
            "train has no column 'sound' (audio_column, the sound); it has ['audio', 'label'].",
        ),
        (
            "audio_classification",
            ["--data.name", "extractor"],
            "extractor holds no file that ends in one of ['.wav', '.flac', '.mp3', '.ogg', '.opus', '.m4a'].",
        ),
        (
            "speech_recognition",
            ["--data.method", "seq2seq", "--model.tokenizer", "absent"],
            "'absent' is no directory here, and was not found on the hub",
        ),
        (
            "speech_recognition",
            ["--data.method", "seq2seq", "--training.predict_with_generate", "false"],
            "What is predicted are generated texts, and predict_with_generate is off. "
            "Give training.predict_with_generate true, or training.do_predict false.",
        ),
        (
            "speech_pretraining",
            ["--model.config", "{model_type: hubert, num_hidden_layers: 1}"],
            "A hubert is no model for this task: transformers has no AutoModelForPreTraining of it.",
        ),
    ],
)
def test_data_or_a_model_that_do_not_fit_end_with_2_and_one_line(file_of, task, words, message, capsys):
    if task == "speech_recognition":
        pytest.importorskip("jiwer", reason="pip install jiwer")
    assert main(["train", file_of(task), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trainwright train: ") and message in line


def test_a_question_without_an_answer_names_the_option_that_allows_it(file_of, tmp_path, capsys):
    file = file_of("question_answering")
    write_lines(tmp_path / "train.jsonl", [{**next(questions(1)), "answer": ""}])
    assert main(["train", file]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "trainwright train: train.jsonl: the question 'q0' has no answer. "
        "Use data.version_2_with_negative where that is meant."
    )


def test_pretraining_takes_no_adapter(file_of, capsys):
    pytest.importorskip("peft")
    assert main(["train", file_of("speech_pretraining"), "--model", "{path: extractor}", "--lora.r", "2"]) == 2
    assert capsys.readouterr().err == (
        "command line: model: lora trains an adapter of a finished model; pretraining trains all weights. "
        "Remove lora.\n"
    )


def test_generating_texts_is_no_training_and_the_script_is_named(file_of, capsys):
    assert main(["train", file_of("multiple_choice"), "--task", "text_generation"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "command line: task='text_generation' trains nothing: a trained model generates texts. "
        "See: python examples/text_generation.py --help"
    )
