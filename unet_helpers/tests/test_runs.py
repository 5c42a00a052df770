import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from unet_helpers import runs
from unet_helpers.config import UserError
from unet_helpers.model import build_model
from unet_helpers.runs import COLUMNS, Progress, load_run, read_history


@pytest.fixture
def run(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_opened_with_its_weights_in_evaluation_mode(run):
    opened = load_run(run)
    assert not opened.model.training
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in opened.model.state_dict().items())
    assert opened.threshold == json.loads((run / "metrics.json").read_text())["threshold"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "model.safetensors"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(UserError, match=name):
        load_run(run)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_run(tmp_path / "nowhere")


def test_weights_cut_short_are_named(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_run(run)


def test_weights_of_another_network_are_refused(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["widths"] = [4, 16]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="not fit"):
        load_run(run)
    save_file({"something": torch.zeros(3)}, run / "model.safetensors")
    with pytest.raises(UserError, match="not fit"):
        load_run(run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"threshold": 2}', '{"threshold": "half"}', '{"threshold": null}'])
def test_metrics_without_a_usable_threshold_are_refused(run, text):
    (run / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json"):
        load_run(run)


def test_opening_a_run_fetches_no_weights(run, monkeypatch):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= {"architecture": "Unet", "encoder": "resnet18", "encoder_weights": "imagenet"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = []
    monkeypatch.setattr(runs, "build_model", lambda model: asked.append(model.encoder_weights) or build_model(model))
    with pytest.raises(UserError, match="not fit"):
        load_run(run)
    assert asked == [None]


def scores(dice):
    values = {"loss": 1.0, "accuracy": 0.5, "correct": 1, "total": 2, "threshold": 0.5}
    return values | {"dice": dice}


def best_after(*dices):
    progress = Progress()
    for epoch, dice in enumerate(dices):
        progress.epoch = epoch
        progress.record(epoch, 0.1, 1.0, 1.0, 1.0, scores(dice))
    return progress.best_epoch


def test_the_best_epoch_is_the_first_with_the_highest_dice():
    nan = float("nan")
    assert best_after(0.1, 0.5, 0.3) == 1
    assert best_after(0.1, 0.5, 0.5) == 1
    assert best_after(0.6, 0.5, 0.3) == 0
    assert best_after(nan, nan, nan) == 2  # nothing to find in the validation images: the latest
    assert best_after(nan, 0.2, 0.1) == 1


def test_a_history_reads_back_what_was_recorded(run):
    rows = read_history(run / "history.csv")
    assert all(tuple(row) == COLUMNS for row in rows)
    (run / "history.csv").write_text("epoch,step\nzero,1\n")
    with pytest.raises(UserError, match=r"history\.csv"):
        read_history(run / "history.csv")
