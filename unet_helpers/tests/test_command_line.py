import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_helpers import training
from unet_helpers.__main__ import COMMANDS, main, parse
from unet_helpers.config import RunError, dump_config, from_parsed, load_config
from unet_helpers.sample_data import make_retina

SMALL = [
    "--data.sample_images", "[4,2,2]", "--data.sample_size", "64", "--augmentation.patch_size", "32", "--model.widths",
    "[4,8]", "--training.epochs", "1", "--training.steps_per_epoch", "2", "--training.device", "cpu",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        retina = make_retina(number, 48)
        for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "set" / kind / f"eye{number}.png")
    return tmp_path / "set"


def test_the_report_of_several_classes_can_be_read(three_classes, capsys):
    assert main(["evaluate", str(three_classes)]) == 0
    lines = {line[:22].strip(): line[23:] for line in capsys.readouterr().out.splitlines()}
    assert main(["evaluate", str(three_classes), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert lines["absent"] == "none"
    assert lines["dice_ci95"] == "{:.4f} to {:.4f}".format(*scores["dice_ci95"])
    assert not any("per_class" in name or "confusion" in name for name in lines)
    for index, name in enumerate(scores["classes"]):
        low, high = scores["per_class_dice_ci95"][index]
        assert lines[f"class {name}"].endswith(f"dice_ci95 {low:.4f} to {high:.4f}")
        assert lines[f"class {name}"].startswith(f"dice {scores['per_class']['dice'][index]:.4f}, iou ")


def test_train_evaluate_predict_benchmark_one_after_the_other(tmp_path, capsys, folder):
    run = str(tmp_path / "run")
    assert main(["train", "--run", run, *SMALL]) == 0
    assert "Validation Dice" in capsys.readouterr().out
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.training.epochs, config.model.widths, config.data.sample_images) == (1, (4, 8), (4, 2, 2))
    assert main(["evaluate", run, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["dice"] <= 1
    assert main(["evaluate", run, "--compare", run, "--split", "val"]) == 0
    assert "compared" in capsys.readouterr().out
    output = str(tmp_path / "out")
    assert main(["predict", run, str(folder / "images"), "--output", output, "--truth", str(folder / "masks")]) == 0
    assert len(os.listdir(output)) == 18
    assert main(["benchmark", "--json", "--steps", "2", "--size", "[40,50]", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["predict_seconds"]["low"] <= result["predict_seconds"]["median"] <= result["predict_seconds"]["high"]
    assert 0 < result["data_share"] < 1
    assert result["peak_memory_gib"] > 0
    assert 0 < result["images_per_second"]["low"] <= result["images_per_second"]["high"]
    medians = (result[f"{name}_seconds"]["median"] for name in ("decode", "cached"))
    assert result["cache_saves_seconds"] == pytest.approx(next(medians) - next(medians))


def test_resume_takes_the_settings_of_the_run(tmp_path, small_config, monkeypatch, capsys):
    real = training.finish

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finish", interrupted)
    (tmp_path / "c.yaml").write_text(dump_config(small_config))
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--run", run]) == 130
    monkeypatch.setattr(training, "finish", real)
    assert main(["train", "--resume", run, "--training.workers", "1"]) == 0
    assert main(["train", f"--resume={run}"]) == 2
    assert "finished" in capsys.readouterr().err


def test_prepare_reports_and_writes_lists(tmp_path, capsys, folder):
    arguments = ["--data-root", str(folder), "--output", str(tmp_path / "lists")]
    offline = ["--offline", str(tmp_path / "offline")]
    assert main(["prepare", "folder", *arguments, *offline]) == 0
    written = ["folder_sheet.png", "folder_test.csv", "folder_train.csv", "folder_val.csv"]
    assert sorted(os.listdir(tmp_path / "lists")) == written
    assert len(os.listdir(tmp_path / "offline" / "train" / "image")) == 20
    assert "6 images" in capsys.readouterr().out


def wrong_inputs(tmp_path, folder, run):
    """Each wrong input of the command line with a word that its message must hold."""
    images, masks = folder / "images", folder / "masks"
    whole = ["train", "--run", str(tmp_path / "new"), "--data.name", "folder", "--data.root", str(folder)]
    train = [*whole, *SMALL[4:]]

    def case(name):
        # Changes the folder for the one case at hand; every case starts from fresh copies.
        if name == "missing data root":
            return [
                "train",
                "--run",
                str(tmp_path / "new"),
                "--data.name",
                "drive",
                "--data.root",
                "nowhere",
            ], "nowhere"
        if name == "image without mask":
            (masks / "eye3.png").unlink()
            return train, "eye3.png"
        if name == "mask of another size":
            Image.new("L", (47, 48)).save(masks / "eye3.png")
            return train, "eye3.png"
        if name == "mask with unexpected values":
            Image.fromarray(np.random.default_rng(0).integers(0, 200, (48, 48), dtype=np.uint8)).save(
                masks / "eye3.png"
            )
            return train, "eye3.png"
        if name == "truncated TIFF":
            Image.open(images / "eye3.png").save(images / "eye3.tif")
            (images / "eye3.png").unlink()
            (images / "eye3.tif").write_bytes((images / "eye3.tif").read_bytes()[:3000])
            return train, "eye3.tif"
        if name == "text named .png":
            (images / "eye3.png").write_text("no picture")
            return train, "eye3.png"
        if name == "empty folder":
            shutil.rmtree(images)
            shutil.rmtree(masks)
            return train, f"{folder}: no pictures"
        if name == "misspelt key":
            (tmp_path / "c.yaml").write_text("training:\n  epoch: 3\n")
            return [*train, "--config", str(tmp_path / "c.yaml")], "epoch"
        if name == "wrong type":
            (tmp_path / "c.yaml").write_text("training:\n  epochs: many\n")
            return [*train, "--config", str(tmp_path / "c.yaml")], "many"
        if name == "file that is no YAML":
            (tmp_path / "c.yaml").write_text("training: [\n")
            return [*train, "--config", str(tmp_path / "c.yaml")], "c.yaml"
        if name == "missing settings file":
            return [*train, "--config", str(tmp_path / "none.yaml")], "none.yaml"
        if name == "misspelt flag":
            return [*train, "--training.epoch", "3"], "training.epoch"
        if name == "negative learning rate":
            return [*train, "--training.learning_rate", "-0.001"], "training.learning_rate"
        if name == "no GPU":
            return [*train, "--training.device", "cuda"], "cuda"
        if name == "weights that do not fit":
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace("- 8", "- 16"))
            return ["evaluate", str(run)], "model.safetensors"
        if name == "weights cut short":
            (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
            return ["evaluate", str(run)], "model.safetensors"
        if name == "run without metrics":
            (run / "metrics.json").unlink()
            return ["predict", str(run), str(images), "--output", str(tmp_path / "new")], "metrics.json"
        if name == "output is a file":
            (tmp_path / "taken").write_text("")
            return ["predict", str(run), str(images), "--output", str(tmp_path / "taken")], "taken"
        if name == "output below a file":
            (tmp_path / "taken").write_text("")
            return [*train, "--run", str(tmp_path / "taken" / "run")], "taken"
        if name == "prepare into a file":
            (tmp_path / "taken").write_text("")
            return ["prepare", "folder", "--data-root", str(folder), "--output", str(tmp_path / "taken")], "taken"
        if name == "image to predict is missing":
            return ["predict", str(run), "nowhere.png", "--output", str(tmp_path / "new")], "nowhere.png"
        if name == "home of nobody":
            return ["prepare", "folder", "--data-root", "~nobody.of.this.name/x"], "nobody.of.this.name"
        if name == "name too long":
            return ["predict", str(run), "x" * 300, "--output", str(tmp_path / "new")], "xxx"
        if name == "no command":
            return [], "command"
        if name == "unknown command":
            return ["tain"], "tain"
        raise AssertionError(name)

    return case


@pytest.mark.parametrize(
    "name",
    [
        "missing data root", "image without mask", "mask of another size", "mask with unexpected values",
        "truncated TIFF", "text named .png", "empty folder", "misspelt key", "wrong type", "file that is no YAML",
        "missing settings file", "misspelt flag", "negative learning rate", "no GPU", "weights that do not fit",
        "weights cut short", "run without metrics", "output is a file", "output below a file", "prepare into a file",
        "image to predict is missing", "no command", "unknown command", "home of nobody", "name too long",
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_line_and_exit_code_2(name, tmp_path, folder, trained_run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    arguments, word = wrong_inputs(tmp_path, folder, run)(name)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert word in captured.err
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, trained_run, folder, capsys, monkeypatch):
    def read_only(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    assert main(["predict", str(trained_run), str(folder / "images"), "--output", str(tmp_path / "locked")]) == 2
    assert "locked" in capsys.readouterr().err


def test_help_names_each_setting_and_what_it_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    helped = capsys.readouterr().out
    assert "--training.learning_rate" in helped
    assert "Peak learning rate" in helped or "peak learning rate" in helped


def test_the_program_itself_ends_with_the_exit_code_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "unet_helpers", "evaluate", "nowhere"]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "nowhere" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_interrupting_a_training_says_so_and_leaves_a_run_to_resume(tmp_path):
    command = [sys.executable, "-m", "unet_helpers", "train", "--run", str(tmp_path / "run"), *SMALL]
    command += ["--training.epochs", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs, these tests among them perhaps, are started with the signal switched off.
    process = subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    started = time.monotonic()
    try:
        while not (tmp_path / "run" / "state" / "last.safetensors").exists():
            assert time.monotonic() - started < 120
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()  # does nothing to one that has ended
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path, small_config, order):
    small_config.training.epochs = 7
    (tmp_path / "c.yaml").write_text(dump_config(small_config))
    parts = [["--training.epochs", "3"], ["--config", str(tmp_path / "c.yaml")]]
    args = parse(["train", *parts[order[0]], *parts[order[1]]])
    assert (args.train.training.epochs, args.train.seed) == (3, 3)
    assert from_parsed(args.train.as_dict()).model == small_config.model


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RunError("a.png: could not be written;\nmake room."), "a.png: could not be written; make room."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
            "the memory is full:",
        ),
        (MemoryError(), "the memory is full:"),
    ],
)
def test_what_fails_while_running_ends_in_one_line_and_exit_code_1(monkeypatch, capsys, error, words):
    def fail(*_):
        """Like an evaluation for which memory or disk do not suffice."""
        raise error

    monkeypatch.setitem(COMMANDS, "evaluate", fail)
    assert main(["evaluate", "run"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {words}")
    assert captured.err.count("\n") == 1


def test_output_that_nobody_reads_ends_quietly(trained_run):
    command = [sys.executable, "-m", "unet_helpers", "evaluate", str(trained_run), "--json", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=120) == 1


def test_a_home_folder_behind_an_equals_sign_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse(["predict", "run", "a.png", "--output=~/x"])
    assert args.predict.output == str(tmp_path / "x")
    (tmp_path / "c.yaml").write_text("{seed: 5}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{seed: 6}")
    assert parse(["train", "--config=~/c.yaml"]).train.seed == 5
    assert parse(["train", "--resume=~/run"]).train.seed == 6


EVALUATE, PREDICT = "evaluation.evaluate", "prediction.predict"
FLAGS = [
    (EVALUATE, "", {"save": False, "split": "test", "flips": True, "min_size": 0}),
    (EVALUATE, "--save --split val", {"save": True, "split": "val"}),
    (EVALUATE, "--no-flips --device cpu", {"flips": False, "device": "cpu"}),
    (EVALUATE, "--rotations --min-size 7", {"flips": "rotations", "min_size": 7}),
    (PREDICT, "a.png", {"gif": False, "max_pixels": None, "truth": None, "min_size": 0}),
    (PREDICT, "a.png --gif --max-pixels 99", {"gif": True, "max_pixels": 99}),
    (PREDICT, "a.png --truth m --min-size 7", {"truth": "m", "min_size": 7}),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), FLAGS)
def test_flags_reach_what_does_the_work(name, arguments, expected, trained_run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(f"unet_helpers.{name}", lambda *a, **options: calls.append((a, options)) or {})
    assert main([name.split(".")[1], str(trained_run), *arguments.split()]) == 0
    ((positional, options),) = calls
    assert expected.items() <= options.items()
    if name == PREDICT:
        assert str(positional[2]) == str(Path("predictions") / trained_run.name)


def test_another_data_set_is_scored_where_its_flags_say(trained_run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("unet_helpers.evaluation.evaluate", lambda run, **options: calls.append(options) or {})
    main(["evaluate", str(trained_run), "--data", "folder", "--data-root", "there"])
    main(["evaluate", str(trained_run)])
    there, own = (options["data"] for options in calls)
    assert (there.name, there.root, there.sample_size) == ("folder", "there", 64)
    assert own == load_config(trained_run / "config.yaml").data


def test_preparing_may_download_unless_told_not_to_and_exporting_names_the_file_after_the_run(trained_run, monkeypatch):
    calls = []
    monkeypatch.setattr("unet_helpers.prepare.prepare", lambda config, output, download: calls.append(download) or "")
    for options in ([], ["--no-download"]):
        assert main(["prepare", "drive", *options]) == 0
    assert calls == [True, False]
    monkeypatch.setattr("unet_helpers.runs.export", lambda run, output: calls.append((run, str(output))))
    assert main(["export", str(trained_run)]) == 0
    assert calls[-1] == (str(trained_run), f"{trained_run.name}.onnx")


def test_rotations_and_no_flips_exclude_each_other(capsys):
    assert main(["evaluate", "run", "--rotations", "--no-flips"]) == 2
    assert "not allowed" in capsys.readouterr().err
