import copy
import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel

from unet_helpers import training
from unet_helpers.config import AugmentationConfig, DataConfig, ModelConfig, RunError, UserError, dump_config
from unet_helpers.datasets import WholeImages
from unet_helpers.evaluation import samples_of
from unet_helpers.losses import SegmentationLoss
from unet_helpers.model import build_model
from unet_helpers.prediction import predict_probabilities
from unet_helpers.runs import PUBLISHED, load_run, load_state, read_history
from unet_helpers.sample_data import make_retina
from unet_helpers.tests.conftest import SMALL_ENCODER
from unet_helpers.training import learning_rate, shared_batches, train

WEIGHTS = "model.safetensors"
LAST = "state/last.safetensors"


def same(path: Path, other: Path) -> bool:
    a, b = load_file(path), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("frozen", "rate"), [(1.0, 1.0), (0.0, 0.0), (0.5, 1.0), (0.0, 0.1)])
def test_an_encoder_learns_later_or_more_slowly(small_config, tmp_path, monkeypatch, frozen, rate):
    small_config.model = ModelConfig("Unet", SMALL_ENCODER)
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=4, batch_size=2)
    small_config.training.encoder_frozen, small_config.training.encoder_rate = frozen, rate
    small_config.training.weight_decay = 0.02
    seen, rates, real = [], [], training.train_step

    def observed(model, optimiser, *rest):
        decoder, encoder = optimiser.param_groups
        assert decoder["weight_decay"] == encoder["weight_decay"] == 0.02
        rates.append((decoder["lr"], encoder["lr"]))
        before = {name: value.clone() for name, value in model.named_parameters()}
        loss = real(model, optimiser, *rest)
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        seen.append((any("encoder" in name for name in moved), any("decoder" in name for name in moved)))
        return loss

    monkeypatch.setattr(training, "train_step", observed)
    for nothing in ("save_epoch", "finish"):  # only the steps are looked at
        monkeypatch.setattr(training, nothing, lambda *_: {})
    train(small_config, tmp_path / "run", quiet=True)
    assert seen[:3] == [(rate > 0 and frozen <= step / 4, True) for step in range(3)]  # at the last step the rate is 0
    for step, (decoder, encoder) in enumerate(rates):
        assert encoder == pytest.approx(decoder * rate * (frozen <= step / 4))


def test_a_network_starts_from_the_weights_of_a_run(small_config, trained_run, tmp_path):
    small_config.model.weights = str(trained_run / WEIGHTS)
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=1, learning_rate=1e-12)
    train(small_config, tmp_path / "run", quiet=True)
    best = max(read_history(trained_run / "history.csv"), key=lambda row: row["val_dice"])
    assert read_history(tmp_path / "run/history.csv")[0]["val_loss"] == best["val_loss"]
    shutil.move(tmp_path / "run", tmp_path / "moved")
    small_config.model.weights = None
    load_run(tmp_path / "moved")  # does not need the weights it started from
    small_config.model.weights, small_config.model.widths = str(trained_run / WEIGHTS), (4, 8, 16)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit the model"):
        train(small_config, tmp_path / "other", quiet=True)
    small_config.model.weights = str(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"none\.safetensors: there is no such"):
        train(small_config, tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a_run_leaves_its_five_files_and_a_state(trained_run):
    assert {path.name for path in trained_run.iterdir()} == {*PUBLISHED, "state"}
    assert [path.name for path in (trained_run / "state").iterdir()] == ["last.safetensors"]
    assert (trained_run / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_history_begins_with_the_untrained_network_and_has_a_row_an_epoch(trained_run):
    with open(trained_run / "history.csv", newline="") as file:
        raw = list(csv.DictReader(file))
    assert [row["epoch"] for row in raw] == ["0", "1", "2"]
    assert [row["step"] for row in raw] == ["0", "3", "6"]
    assert raw[0]["train_loss"] == ""
    rows = read_history(trained_run / "history.csv")
    assert all(row["val_correct"] <= row["val_total"] for row in rows)
    assert rows[1]["val_accuracy"] == pytest.approx(rows[1]["val_correct"] / rows[1]["val_total"])
    assert rows[1]["train_loss"] > rows[2]["train_loss"]
    # Six steps up to 3e-3, of which one rises: the third has fallen two fifths of the way along the cosine.
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 1.9635e-3, 0], rel=1e-4, abs=1e-12)


def test_the_threshold_and_the_epoch_are_those_of_the_highest_dice_on_validation_images(trained_run):
    metrics, opened = json.loads((trained_run / "metrics.json").read_text()), load_run(trained_run)
    images = WholeImages(samples_of(opened.config, "val"), opened.config)
    seen = [(predict_probabilities(opened.model, image)[mask != 255], mask[mask != 255]) for image, mask, _ in images]
    probability, truth = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))

    def dice(threshold):
        found = (probability * 65535).round() >= threshold * 65535
        return 2 * (found & (truth == 1)).sum() / (found.sum() + (truth == 1).sum())

    assert dice(metrics["threshold"]) >= max(dice(threshold) for threshold in np.linspace(0.001, 0.999, 999))
    assert metrics["val"]["dice"] == pytest.approx(dice(metrics["threshold"]))
    rows = read_history(trained_run / "history.csv")
    assert metrics["best_epoch"] == max(rows, key=lambda row: row["val_dice"])["epoch"]
    assert metrics["val"]["threshold"] == metrics["threshold"]
    assert metrics["steps"] == 6
    assert "test" not in metrics


def test_training_again_gives_the_same_weights_with_any_number_of_workers(trained_run, small_config, tmp_path):
    small_config.training.workers = 2
    train(small_config, tmp_path / "again", quiet=True)
    assert same(trained_run / WEIGHTS, tmp_path / "again" / WEIGHTS)
    assert same(trained_run / LAST, tmp_path / "again" / LAST)


def test_another_seed_gives_other_weights(trained_run, small_config, tmp_path):
    train(replace(small_config, seed=4), tmp_path / "other", quiet=True)
    assert not same(trained_run / WEIGHTS, tmp_path / "other" / WEIGHTS)
    first, other = (read_history(run / "history.csv")[0] for run in (trained_run, tmp_path / "other"))
    assert first["val_loss"] != other["val_loss"]  # before the first step


def test_a_gradient_is_shortened_to_its_largest_norm(small_config):
    torch.manual_seed(0)
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 2, (2, 32, 32))
    start, accelerator, moves = build_model(small_config.model), training.make_accelerator(small_config), []
    for clip_norm in (0.0, 1e-3, 1e3):
        network = copy.deepcopy(start)
        optimiser = torch.optim.SGD(network.parameters(), lr=1)
        training.train_step(network, optimiser, SegmentationLoss(1), accelerator, images, masks, clip_norm)
        moves.append(parameters_to_vector(network.parameters()) - parameters_to_vector(start.parameters()))
    whole, shortened, short_enough = moves
    assert shortened.norm().item() == pytest.approx(1e-3, rel=1e-2)  # what rounding leaves of so small a difference
    assert whole.norm() > 0.01
    assert torch.cosine_similarity(shortened, whole, 0) > 0.999
    torch.testing.assert_close(short_enough, whole)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-20])
def test_training_shortens_gradients_as_its_settings_say(small_config, tmp_path, clip_norm):
    """To AdamW, which adds 1e-8 to a gradient's size before it divides by it, so short a one is none."""
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=1, keep_every_epoch=True)
    small_config.training = replace(small_config.training, clip_norm=clip_norm, weight_decay=0.0, ema_decay=0.0)
    train(small_config, tmp_path / "run", quiet=True)
    before, after = (load_file(path) for path in sorted((tmp_path / "run" / "state").glob("epoch_*")))
    moved = [(after[key] - before[key]).abs().max() for key in before if key.endswith(("weight", "bias"))]
    assert max(moved) < 1e-9 if clip_norm else min(moved) > 1e-4


def test_quiet_training_prints_nothing(small_config, tmp_path, capfd):
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=1)
    train(small_config, tmp_path / "quiet", quiet=True)
    assert capfd.readouterr() == ("", "")
    train(small_config, tmp_path / "loud")
    assert "epoch 1/1" in capfd.readouterr().out


def test_without_a_number_of_steps_an_epoch_is_one_pass_over_the_images(small_config, tmp_path):
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=None)
    assert train(small_config, tmp_path / "run", quiet=True)["steps"] == 2  # 5 images in batches of 4


def test_the_usual_size_of_a_view_is_known_only_where_training_pictures_agree(small_config, tmp_path):
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=1)
    for side, expected in ((64, True), (96, False)):
        for number in range(6):
            retina = make_retina(number, side if number % 2 else 64)
            for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
                (tmp_path / f"{side}" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(tmp_path / f"{side}" / kind / f"{number}.png")
        small_config.data = DataConfig(name="folder", root=str(tmp_path / f"{side}"))
        diameter = train(small_config, tmp_path / f"run{side}", quiet=True)["view_diameter"]
        assert (diameter is not None) == expected


def test_a_run_killed_within_an_epoch_and_resumed_by_another_process_gives_the_same_weights(small_config, tmp_path):
    """`kill -9` at the tenth step, of the second epoch; with drop-out, which draws random numbers in the network."""
    small_config.model.dropout = 0.5
    small_config.training.epochs = 4
    small_config.training.steps_per_epoch = 6
    train(small_config, tmp_path / "whole", quiet=True)
    (tmp_path / "c.yaml").write_text(dump_config(small_config))
    run = tmp_path / "killed"
    code = (
        "import itertools, os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from unet_helpers import training\nfrom unet_helpers.config import load_config\n"
        "real, steps = training.train_step, itertools.count(1)\n"
        "def killed(*arguments):\n"
        "    if next(steps) == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "training.train_step = killed\n"
        "training.train(load_config(sys.argv[1]), sys.argv[2], quiet=True)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "c.yaml", run]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert [row["epoch"] for row in read_history(run / "history.csv")] == [0, 1]
    train(small_config, run, resume=True, quiet=True)
    assert same(tmp_path / "whole" / WEIGHTS, run / WEIGHTS)
    assert same(tmp_path / "whole" / LAST, run / LAST)
    histories = [read_history(path / "history.csv") for path in (tmp_path / "whole", run)]
    timings = {"seconds": 0, "images_per_second": 0}
    assert [row | timings for row in histories[0]] == [row | timings for row in histories[1]]


def test_an_interrupted_epoch_is_repeated_with_the_same_random_numbers(small_config, tmp_path, monkeypatch):
    small_config.model.dropout = 0.5
    small_config.training.epochs = 3
    train(small_config, tmp_path / "whole", quiet=True)

    steps = itertools.count()
    real = training.train_step

    def interrupted(*arguments):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small_config, tmp_path / "run", quiet=True)
    monkeypatch.setattr(training, "train_step", real)
    torch.manual_seed(99)  # whatever the process did in between
    small_config.training.workers = 1
    train(small_config, tmp_path / "run", resume=True, quiet=True)
    assert same(tmp_path / "whole" / WEIGHTS, tmp_path / "run" / WEIGHTS)
    assert same(tmp_path / "whole" / LAST, tmp_path / "run" / LAST)


def test_the_saved_weights_are_the_average_over_time(small_config, tmp_path):
    """With one step an epoch and decay d the average is d times the one before plus (1-d) times the plain weights."""
    small_config.training.steps_per_epoch = 1
    small_config.training.epochs = 3
    small_config.training.ema_decay = 0.7
    small_config.training.keep_every_epoch = True
    train(small_config, tmp_path / "run", quiet=True)
    kept = sorted((tmp_path / "run" / "state").glob("epoch_*.safetensors"))
    assert [path.name[:10] for path in kept] == [f"epoch_{epoch:04d}" for epoch in range(4)]
    before, averaged = load_file(kept[2]), load_file(kept[3])
    plain = {
        k.removeprefix("network."): v for k, v in load_file(tmp_path / "run" / LAST).items() if k.startswith("network.")
    }
    key = "stem.conv1.weight"
    assert not torch.equal(plain[key], averaged[key])
    torch.testing.assert_close(averaged[key], 0.7 * before[key] + 0.3 * plain[key])
    # Batch norm's statistics are averaged as well: they belong to the averaged weights.
    key = "stem.norm1.running_mean"
    torch.testing.assert_close(averaged[key], 0.7 * before[key] + 0.3 * plain[key])


def test_without_averaging_the_plain_weights_are_saved(small_config, tmp_path):
    small_config.training.ema_decay = 0.0
    small_config.training.keep_every_epoch = True
    train(small_config, tmp_path / "run", quiet=True)
    averaged = load_file(sorted((tmp_path / "run" / "state").glob("epoch_*"))[-1])
    plain = load_file(tmp_path / "run" / LAST)
    assert all(torch.equal(value, plain[f"network.{key}"]) for key, value in averaged.items())


def test_runs_of_different_precision_can_follow_each_other_in_one_process(small_config, tmp_path):
    for precision, used in (("bf16", "bf16"), ("fp32", "no")):
        small_config.training = replace(small_config.training, precision=precision, epochs=1)
        assert train(small_config, tmp_path / precision, quiet=True)["precision"] == used


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("unet", {"padding": "valid", "norm": "none"}),
        ("unet", {"norm": "group", "activation": "pysilu", "upsampling": "bilinear"}),
        ("Unet", {"encoder": SMALL_ENCODER}),
    ],
)
def test_other_networks_train_and_load_too(small_config, tmp_path, architecture, settings):
    small_config.model = replace(small_config.model, architecture=architecture, **settings)
    small_config.augmentation = replace(small_config.augmentation, patch_size=64)
    small_config.training.epochs = 1
    small_config.training.steps_per_epoch = 1
    metrics = train(small_config, tmp_path / "run", quiet=True)
    assert 0 <= metrics["val"]["dice"] <= 1
    load_run(tmp_path / "run")


def test_several_classes_train_too(small_config, tmp_path):
    small_config.data.labels = "artery_vein"
    small_config.model.num_classes = 3
    metrics = train(small_config, tmp_path / "run", quiet=True)
    assert metrics["threshold"] is None
    assert len(metrics["val"]["per_class"]["dice"]) == 3
    assert load_run(tmp_path / "run").threshold is None


def test_labels_that_the_network_has_no_class_for_are_refused_before_training(small_config, tmp_path):
    small_config.data.labels = "artery_vein"
    with pytest.raises(UserError, match="num_classes"):
        train(small_config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_checkpoint(small_config, tmp_path, monkeypatch):
    real, steps = training.train_step, itertools.count()

    def broken(*arguments):
        loss = real(*arguments)
        return loss * float("nan") if next(steps) == 4 else loss

    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(RunError, match=r"epoch 2.*learning_rate"):
        train(small_config, tmp_path / "run", quiet=True)
    assert [row["epoch"] for row in read_history(tmp_path / "run" / "history.csv")] == [0, 1]
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / WEIGHTS).values())


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: not enough memory: you tried"])
def test_full_memory_says_which_setting_to_lower(small_config, tmp_path, monkeypatch, message):
    def full(*arguments):
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(RunError, match=r"training\.batch_size \(now 4\).*--resume with --training\.device=cpu"):
        train(small_config, tmp_path / "run", quiet=True)


def test_too_little_shared_memory_says_so(small_config, tmp_path, monkeypatch):
    """As in Docker, whose /dev/shm has 64 MB; the message is torch's."""

    def full(*arguments):
        where = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        raise RuntimeError(f"{where}RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: 28")

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(RunError, match=r"^A process that prepares data .*training\.workers .*--shm-size"):
        train(small_config, tmp_path / "run", quiet=True)


def test_a_history_that_another_program_holds_open_does_not_end_the_training(small_config, tmp_path, monkeypatch):
    """As Windows refuses to replace what a spreadsheet shows; the checkpoint holds the history, too."""
    real, refused, waited = os.replace, Counter(), []

    def replace(source, target):
        name = Path(target).name
        refused[name] += 1
        if refused[name] <= {"history.csv": 6, "model.safetensors": 3}.get(name, 0):  # the latter for a moment only
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", waited.append)
    train(small_config, tmp_path / "run", quiet=True)
    assert waited[:3] == [0.1, 0.4, 1.6]
    assert len(read_history(tmp_path / "run" / "history.csv")) == 1 + small_config.training.epochs
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_folder_that_holds_a_run_is_not_overwritten(trained_run, small_config):
    before = (trained_run / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(small_config, trained_run, quiet=True)
    assert (trained_run / WEIGHTS).read_bytes() == before


def test_a_run_is_not_resumed_with_other_settings(trained_run, small_config, tmp_path):
    with pytest.raises(UserError, match="finished"):
        train(small_config, trained_run, resume=True, quiet=True)
    with pytest.raises(UserError, match=r"config\.yaml"):
        train(small_config, tmp_path / "empty", resume=True, quiet=True)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(trained_run / "config.yaml", tmp_path / "unfinished")
    small_config.training.learning_rate = 1e-4
    with pytest.raises(UserError, match=r"training\.learning_rate"):
        train(small_config, tmp_path / "unfinished", resume=True, quiet=True)


def test_a_run_goes_on_without_the_weights_that_it_started_from(trained_run, small_config, tmp_path):
    shutil.copy(trained_run / WEIGHTS, tmp_path / "start.safetensors")
    small_config.model.weights = str(tmp_path / "start.safetensors")
    train(small_config, tmp_path / "run", quiet=True)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "metrics.json").unlink()  # as if killed at the very end
    (tmp_path / "start.safetensors").unlink()
    train(small_config, tmp_path / "again", resume=True, quiet=True)
    assert same(tmp_path / "again" / WEIGHTS, tmp_path / "run" / WEIGHTS)
    with pytest.raises(UserError, match=r"start\.safetensors"):
        train(small_config, tmp_path / "new", quiet=True)


def test_a_run_is_not_resumed_on_other_images(small_config, tmp_path):
    for number in range(6):
        retina = make_retina(number, 64)
        for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "data" / kind / f"eye{number}.png")
    small_config.data = DataConfig(name="folder", root=str(tmp_path / "data"))
    train(small_config, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "metrics.json").unlink()  # as if killed at the very end
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    small_config.data.root = str(tmp_path / "moved")
    train(small_config, tmp_path / "again", resume=True, quiet=True)
    for kind in ("images", "masks"):
        (tmp_path / "moved" / kind / "eye0.png").rename(tmp_path / "moved" / kind / "eye9.png")
    with pytest.raises(UserError, match="run: cannot be resumed, as its images are no longer those"):
        train(small_config, tmp_path / "run", resume=True, quiet=True)


def test_a_run_that_another_process_has_finished_stays_as_it_is(small_config, trained_run, tmp_path, monkeypatch):
    real, run = training.train_step, tmp_path / "run"

    def overtaken(*arguments):
        if not (run / "metrics.json").exists():
            for name in ("metrics.json", "model.safetensors"):
                shutil.copy(trained_run / name, run)
        return real(*arguments)

    monkeypatch.setattr(training, "train_step", overtaken)
    with pytest.raises(RunError, match="finished by another process"):
        train(small_config, run, quiet=True)
    assert same(run / WEIGHTS, trained_run / WEIGHTS)


def test_a_budget_of_any_size_takes_no_memory():
    batches = shared_batches(0, 10**6, 8, 1, 2)
    assert sys.getsizeof(batches) < 10_000
    assert next(iter(batches)) == range(4, 8)


def test_a_damaged_checkpoint_is_not_resumed_from(trained_run, small_config, tmp_path):
    for file in ("config.yaml", LAST):
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained_run / file, tmp_path / "run" / file)
    whole = (tmp_path / "run" / LAST).read_bytes()
    (tmp_path / "run" / LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"last\.safetensors"):
        train(small_config, tmp_path / "run", resume=True, quiet=True)


def test_an_output_that_is_a_file_is_refused(small_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.state: cannot be written"):
        train(small_config, tmp_path / "file", quiet=True)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine_to_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10))
    scheduler_like = [1 + math.cos(math.pi * k / 90) for k in range(1, 91)]
    np.testing.assert_allclose(rates[10:], scheduler_like, atol=1e-12)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(math.isfinite(learning_rate(0, 1, 1.0, share)) for share in (0.0, 0.5, 0.99))


def test_processes_share_each_batch_without_overlap():
    shares = [list(shared_batches(2, 5, 6, process, 3)) for process in range(3)]
    for step in range(3):
        together = [number for share in shares for number in share[step]]
        assert together == list(range((2 + step) * 6, (3 + step) * 6))


def test_two_processes_give_the_loss_of_one_with_the_same_batch(small_config, tmp_path):
    """Group norm, fp32, no augmentation; patches hold unequal numbers of valid pixels, so averaging averages fails."""
    small_config.model.norm = "group"
    small_config.augmentation = AugmentationConfig(
        patch_size=48, flips=False, rotation=0, scale=(1, 1), brightness=0, contrast=0, noise=0
    )
    (tmp_path / "c.yaml").write_text(dump_config(small_config))
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from unet_helpers import training\nfrom unet_helpers.config import load_config\n"
        "real = training.make_accelerator\n"
        "def noisy(*settings):\n"
        "    accelerator = real(*settings)\n"
        "    if accelerator.is_main_process: print('processes', accelerator.num_processes, flush=True)\n"
        "    return accelerator\n"
        "training.make_accelerator = noisy\n"
        "training.train(load_config(sys.argv[1]), sys.argv[2], quiet=True)\n"
    )
    (tmp_path / "job.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "job.py"), str(tmp_path / "c.yaml"), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "processes 2" in done.stdout
    train(small_config, tmp_path / "one", quiet=True)
    one, two = (read_history(tmp_path / name / "history.csv") for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["val_correct"] == pytest.approx(ours["val_correct"], abs=3)
        assert theirs["val_total"] == ours["val_total"]
        for name in ("train_loss", "val_loss", "val_dice"):
            if ours["epoch"] or name != "train_loss":  # the untrained network has none
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    a, b = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(small_config, tmp_path, monkeypatch):
    real = training.make_accelerator

    def three(*settings):
        accelerator = real(*settings)
        monkeypatch.setattr(type(accelerator), "num_processes", 3)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", three)
    with pytest.raises(UserError, match=r"training\.batch_size"):
        train(small_config, tmp_path / "run", quiet=True)


def test_tensorboard_gets_the_history(small_config, tmp_path):
    small_config.training.tensorboard = True
    train(small_config, tmp_path / "run", quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run" / "state" / "tensorboard").rglob("events*")).parent))
    events.Reload()
    written = [event.value for event in events.Scalars("val_dice")]
    assert written == pytest.approx(
        [row["val_dice"] for row in read_history(tmp_path / "run" / "history.csv")], rel=1e-5
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_gpu_trains_in_every_precision(small_config, tmp_path, precision):
    """fp16 with a gradient scaler is what a T4 uses; it can be forced on any GPU."""
    small_config.training = replace(small_config.training, device="cuda", precision=precision)
    metrics = train(small_config, tmp_path / "run", quiet=True)
    expected = {"fp16": "fp16", "bf16": "bf16", "fp32": "no"}[precision]
    assert metrics["precision"] == expected
    assert read_history(tmp_path / "run" / "history.csv")[-1]["train_loss"] > 0


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_divergence_in_the_last_step_of_an_epoch_is_called_one(small_config, tmp_path, num_classes):
    small_config.model.num_classes = num_classes
    small_config.data.labels = "vessels" if num_classes == 1 else "artery_vein"
    small_config.training.steps_per_epoch, small_config.training.clip_norm = 1, 0.0
    small_config.training.learning_rate, small_config.training.warmup = 1e30, 0.0
    small_config.training.epochs, small_config.training.ema_decay = 3, 0.0
    with pytest.raises(RunError, match="learning_rate"):
        train(small_config, tmp_path / "run", quiet=True)
    assert all(row["val_loss"] is not None for row in read_history(tmp_path / "run" / "history.csv"))


def test_patches_too_small_for_valid_padding_come_out_before_anything_is_written(small_config, tmp_path):
    small_config.model.padding, small_config.augmentation.patch_size = "valid", 8
    with pytest.raises(UserError, match="at least"):
        train(small_config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_single_value_for_batch_norm_says_what_to_raise(small_config, tmp_path):
    small_config.training.batch_size, small_config.augmentation.patch_size = 1, 2
    with pytest.raises(RunError, match=r"training\.batch_size"):
        train(small_config, tmp_path / "run", quiet=True)


def test_what_is_left_of_a_run_is_neither_overwritten_nor_taken_for_a_whole_one(small_config, trained_run, tmp_path):
    """Weights without their checkpoint cannot be resumed, and a checkpoint alone is still somebody's run."""
    shutil.copytree(trained_run, tmp_path / "a")
    (tmp_path / "a" / "metrics.json").unlink()
    (tmp_path / "a" / LAST).unlink()
    with pytest.raises(UserError, match="is gone"):
        train(small_config, tmp_path / "a", resume=True, quiet=True)
    assert same(tmp_path / "a" / WEIGHTS, trained_run / WEIGHTS)
    shutil.copytree(trained_run, tmp_path / "b")
    for name in PUBLISHED:
        (tmp_path / "b" / name).unlink()
    with pytest.raises(UserError, match="already holds a run"):
        train(small_config, tmp_path / "b", quiet=True)
    assert same(tmp_path / "b" / LAST, trained_run / LAST)


def test_a_run_without_a_gradient_scaler_resumes_with_one(small_config, tmp_path):
    train(small_config, tmp_path / "run", quiet=True)
    network = build_model(small_config.model)
    average = AveragedModel(network, use_buffers=True)
    scaler = torch.amp.GradScaler("cpu")
    assert load_state(tmp_path / "run", network, average, torch.optim.AdamW(network.parameters()), scaler).epoch == 2
    assert scaler.get_scale() == 65536


def test_validation_masks_without_a_scored_pixel_are_refused_before_training(tmp_path, small_config):
    for split in ("train", "val", "test"):
        for number in range(3):
            for kind in ("images", "masks"):
                (tmp_path / "set" / split / kind).mkdir(parents=True, exist_ok=True)
            mask = np.full((40, 40), 255, np.uint8) if split == "val" else np.eye(40, dtype=np.uint8)
            Image.fromarray(mask).save(tmp_path / "set" / split / "masks" / f"{number}.png")
            Image.new("RGB", (40, 40), (number, 99, 9)).save(tmp_path / "set" / split / "images" / f"{number}.png")
    data = DataConfig("folder", str(tmp_path / "set"), mask_values="classes")
    with pytest.raises(UserError, match=r"val.masks.0\.png.*nothing but 255"):
        train(replace(small_config, data=data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
