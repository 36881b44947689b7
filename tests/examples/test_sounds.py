"""The audio tasks on generated tones: the pitch is the class, and a word is a tone."""

import json

import numpy as np
import pytest
import torch
from tests.examples.tiny import example
from tests.examples.tones import PITCHES, RATE, save_wav2vec2, write_tone, write_tunes, write_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sounds/<class>/<n>.wav; words.jsonl: recordings of one or two words with their texts."""
    root = tmp_path_factory.mktemp("sounds")
    for number in range(20):
        name = list(PITCHES)[number % 2]
        write_tone(root / "sounds" / name / f"{number}.wav", [PITCHES[name]])
    write_words(root, 20)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_wav2vec2(tmp_path_factory.mktemp("wav2vec2")))


def arguments(model, out, *more):
    return ["--model_name_or_path", str(model), "--output_dir", str(out), "--report_to", "none", "--use_cpu",
            "--disable_tqdm", "true", "--freeze_feature_encoder", "false", *more]  # fmt: skip


def test_a_folder_of_classes_is_learnt_and_predicted(model, folder, tmp_path):
    script, out = example("audio_classification"), tmp_path / "out"
    metrics = script.main(
        arguments(model, out, "--dataset_name", str(folder / "sounds"), "--validation_split_percentage", "30",
                  "--do_train", "--do_eval", "--num_train_epochs", "25", "--learning_rate", "3e-3",
                  "--max_length_seconds", "0.2")
    )  # fmt: skip
    assert metrics["eval_accuracy"] == 1.0
    test = tmp_path / "test.jsonl"
    test.write_text(
        "\n".join(json.dumps({"audio": str(folder / f"sounds/{c}/{n}.wav")}) for n, c in enumerate(PITCHES))
    )
    script.main(arguments(out, tmp_path / "again", "--test_file", str(test), "--do_predict"))
    assert (tmp_path / "again" / "predictions.tsv").read_text() == "index\tprediction\n0\thigh\n1\tlow\n"


def test_a_sound_that_cannot_be_read_is_named(model, folder, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    (tmp_path / "train.jsonl").write_text('{"audio": "broken.wav", "label": "low"}\n')
    wanted = arguments(model, tmp_path / "out", "--train_file", str(tmp_path / "train.jsonl"), "--do_train")
    with pytest.raises(ValueError, match=r"train\.jsonl, row 1 \(line 1\): no sound can be read from .*broken\.wav"):
        example("audio_classification").main(wanted)


def test_the_plan_shows_the_sampling_rate_and_trains_nothing(model, folder, tmp_path, capsys):
    wanted = ("--dataset_name", str(folder / "sounds"), "--do_train", "--plan")
    assert example("audio_classification").main(arguments(model, tmp_path / "out", *wanted)) == {}
    shown = capsys.readouterr().out
    assert "4,000 Hz" in shown and "high, low" in shown


@pytest.mark.parametrize("width", [2, 4])
def test_sounds_are_brought_to_one_channel_and_one_rate(tmp_path, width):
    from trainwright.tasks.audio import read_audio
    from trainwright.tasks.sources import Split

    write_tone(tmp_path / "a.wav", [300], rate=8000, channels=2, width=width)
    sound = read_audio("a.wav", Split("train", None, str(tmp_path / "x.jsonl")), 0, RATE)
    spectrum = np.abs(np.fft.rfft(sound))
    assert sound.dtype == np.float32 and len(sound) == RATE // 4
    assert np.argmax(spectrum) * RATE / len(sound) == pytest.approx(300, abs=RATE / len(sound))
    assert np.abs(sound).max() == pytest.approx(0.5, abs=0.1)


def test_letters_are_learnt_from_recordings_and_written_down(model, folder, tmp_path):
    pytest.importorskip("jiwer", reason="pip install jiwer")
    files = ("--train_file", str(folder / "words.jsonl"), "--validation_file", str(folder / "words.jsonl"))
    metrics = example("speech_recognition").main(
        arguments(model, tmp_path / "out", "--method", "ctc", *files, "--test_file", str(folder / "words.jsonl"),
                  "--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "120", "--learning_rate", "8e-3")
    )  # fmt: skip
    # The best text for all, "high", has 14 wrong letters of 24 in the four kinds of text: 0.58.
    assert metrics["eval_cer"] < 0.4 and metrics["eval_wer"] < 1
    assert len((tmp_path / "out" / "predictions.txt").read_text().splitlines()) == 20
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert set(vocabulary) >= set("highlow") | {"|", "[PAD]"} and "!" not in vocabulary


def test_texts_are_generated_by_a_sequence_to_sequence_model(folder, tmp_path):
    from tests.examples.tiny import words_tokenizer
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    pytest.importorskip("jiwer", reason="pip install jiwer")
    torch.manual_seed(0)
    tokenizer = words_tokenizer(["HIGH! LOW! HIGH LOW"], tmp_path / "whisper", eos_token="[SEP]")
    settings = WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=20, max_source_positions=100,
        max_target_positions=16, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id, decoder_start_token_id=tokenizer.cls_token_id, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(settings)
    model.generation_config.max_length = 16
    model.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(
        feature_size=20, sampling_rate=RATE, chunk_length=2, hop_length=40, n_fft=160
    ).save_pretrained(tmp_path / "whisper")
    files = ("--train_file", str(folder / "words.jsonl"), "--validation_file", str(folder / "words.jsonl"))
    metrics = example("speech_recognition").main(
        arguments(tmp_path / "whisper", tmp_path / "out", "--method", "seq2seq", *files, "--do_train", "--do_eval",
                  "--generation_max_length", "8", "--num_train_epochs", "2", "--learning_rate", "3e-3")
    )  # fmt: skip
    assert metrics["eval_cer"] >= 0 and (tmp_path / "out" / "tokenizer.json").is_file()


def test_hidden_steps_are_told_from_others_better_with_training(tmp_path):
    model = save_wav2vec2(tmp_path / "wav2vec2", "Wav2Vec2ForPreTraining", feat_extract_norm="layer")
    write_tunes(tmp_path / "tunes", 20)
    wanted = [w for w in arguments(model, tmp_path / "out") if w not in ("--freeze_feature_encoder", "false")]
    metrics = example("speech_pretraining").main(
        [*wanted, "--dataset_name", str(tmp_path / "tunes"), "--validation_split_percentage", "30", "--do_train",
         "--do_eval", "--num_train_epochs", "20", "--learning_rate", "3e-3", "--min_duration_in_seconds", "0.1",
         "--mask_time_length", "2", "--mask_time_prob", "0.5", "--logging_steps", "1"]
    )  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) and np.isfinite(metrics["eval_loss"])


def test_hidden_steps_come_in_spans_and_distractors_are_other_hidden_steps():
    from trainwright.tasks.speech import distractors, hidden_steps

    np.random.seed(0)
    hidden = hidden_steps(100, 0.3, 5)
    edges = np.flatnonzero(np.diff(np.r_[0, hidden.astype(int), 0]))
    assert all(end - start >= 5 for start, end in zip(edges[::2], edges[1::2])) and 5 <= hidden.sum() <= 30
    found = distractors(hidden, 7)
    places = np.flatnonzero(hidden)
    assert found[~hidden].sum() == 0 and np.isin(found[hidden], places).all()
    assert not (found[places] == places[:, None]).any()
