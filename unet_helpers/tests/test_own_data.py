"""From a folder that nobody has seen before to predictions in four commands, for five layouts."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from unet_helpers.__main__ import main
from unet_helpers.config import DataConfig, load_config
from unet_helpers.evaluation import evaluate
from unet_helpers.prediction import predict
from unet_helpers.training import train

COLOURS = np.array([[0, 0, 0], [0, 128, 0], [255, 0, 0], [0, 0, 64]], np.uint8)  # of all below the largest is 0x00ffff
QUICK = [
    "--augmentation.patch_size", "32", "--model.widths", "[4,8]", "--training.epochs", "1", "--training.device", "cpu",
    "--training.steps_per_epoch", "40", "--training.batch_size", "4", "--training.learning_rate", "0.03",
    "--training.ema_decay", "0.8", "--training.dice_weight", "0",
]  # fmt: skip


def scene(number: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 (H, W, 3), whose classes differ in colour, and its mask: stripes, so that no class is rare."""
    rng = np.random.default_rng(number)
    size = rng.integers(48, 65, 2)
    mask = (np.indices(size)[number % 2] // 8 % classes).astype(np.uint8)
    tones = np.array([[70, 70, 70], [60, 200, 60], [210, 60, 60], [60, 60, 220]])
    return (tones[mask] + rng.integers(-25, 25, (*size, 3))).astype(np.uint8), mask


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def two_folders(root: Path) -> list[str]:
    for number in range(8):
        image, mask = scene(number, 2)
        save(root / "images" / f"{number}.png", image)
        save(root / "masks" / f"{number}.png", 255 * mask)
    return [str(root), str(root / "images")]


def side_by_side(root: Path) -> list[str]:
    for number in range(8):
        image, mask = scene(number, 2)
        save(root / f"scan {number}.jpg", image, quality=95)
        save(root / f"scan {number}_mask.png", mask)
    return [str(root), *map(str, sorted(root.glob("*.jpg")))]


def split_folders(root: Path) -> list[str]:
    for number in range(9):
        image, mask = scene(number, 3)
        mask[:4] = 255
        folder = root / ("train", "val", "test")[number % 3]
        save(folder / "img" / f"{number}.tif", image)
        save(folder / "label" / f"{number}.png", mask.astype(np.uint16))
    return [str(root), *(str(root / split / "img") for split in ("train", "val", "test"))]


def listed(root: Path) -> list[str]:
    lines = ["image,mask,group"]
    for number in range(8):
        image, mask = scene(number, 2)
        save(root / "photos" / f"Frau Müller's {number}, left.png", image)
        save(root / "drawn" / f"{number:03d}.gif", 255 * mask)
        lines.append(f'"photos/Frau Müller\'s {number}, left.png",drawn/{number:03d}.gif,patient {number // 2}')
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    return [str(root / "list.csv"), str(root / "photos")]


def coloured_16_bit(root: Path) -> list[str]:
    for number in range(8):
        image, mask = scene(number, 4)
        (root / "images").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "images" / f"{number}.tif"), image[..., ::-1].astype(np.uint16) * 16)
        save(root / "masks" / f"{number}.png", COLOURS[mask])
    return [str(root), str(root / "images")]


@pytest.mark.parametrize(
    ("layout", "classes"),
    [(two_folders, 1), (side_by_side, 1), (split_folders, 3), (listed, 1), (coloured_16_bit, 4)],
)
def test_four_commands_lead_to_predictions_that_are_masks(tmp_path, capsys, layout, classes):
    root, *inputs = layout(tmp_path / "the set")
    run, lists, output = str(tmp_path / "run"), str(tmp_path / "lists"), tmp_path / "predicted"
    assert main(["prepare", "folder", "--data-root", root, "--output", lists]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert ("--model.num_classes" in command) == (classes > 1)
    flags = ["--data.name", "folder", "--data.root", root, "--model.num_classes", str(classes)]
    assert main(["train", "--run", run, *flags, *QUICK]) == 0
    assert main(["evaluate", run, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["dice"] > 0.6
    truth = ["--truth", f"{root}/masks"] if layout is coloured_16_bit else []
    assert main(["predict", run, *inputs, "--output", str(output), *truth]) == 0
    if truth:
        found = np.array(Image.open(output / "3_mask.png"))
        drawn = np.array([0, 2, 3, 1])[scene(3, 4)[1]]  # black, then by value
        hits = (np.array(Image.open(output / "3_errors.png")) == 255).all(2)
        np.testing.assert_array_equal(hits, (found == drawn) & (drawn > 0))
        shown = np.array(Image.open(output / "3_mask.png").convert("RGB"))
        np.testing.assert_array_equal(shown, COLOURS[[0, 3, 1, 2]][found])

    again = tmp_path / "again"
    images = [path for given in map(Path, inputs) for path in ([given] if given.is_file() else given.iterdir())]
    for path in images:
        for target, source in (("images", path), ("masks", output / f"{path.stem}_mask.png")):
            (again / target).mkdir(parents=True, exist_ok=True)
            (again / target / source.name).write_bytes(source.read_bytes())
    assert main(["prepare", "folder", "--data-root", str(again), "--output", lists]) == 0
    capsys.readouterr()
    for split in ("train", "val", "test"):
        assert main(["evaluate", run, "--data-root", str(again), "--split", split, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["dice"] == 1
    assert load_config(tmp_path / "run" / "config.yaml").data.mask_values != "auto"


def test_images_of_any_mixture_of_sizes_train_and_are_scored(tmp_path, small_config):
    sizes = [(1, 40), (40, 1), (1, 1), (7, 100), (48, 48), (33, 17), (130, 60), (2, 2), (5, 31)]
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number, (height, width) in enumerate(sizes):
            for kind in ("images", "masks"):
                (tmp_path / "set" / split / kind).mkdir(parents=True, exist_ok=True)
            mask = rng.integers(0, 3, (height, width), dtype=np.uint8)
            image = (80 * mask[..., None] + rng.integers(0, 20, (height, width, 3))).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "set" / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(tmp_path / "set" / split / "masks" / f"{number}.png")
    config = replace(small_config, data=DataConfig("folder", str(tmp_path / "set")))
    config = replace(config, model=replace(config.model, num_classes=3))
    metrics = train(config, tmp_path / "run", quiet=True)
    assert 0 <= metrics["val"]["dice"] <= 1
    assert evaluate(tmp_path / "run")["n_images"] == len(sizes)
    masks = predict(tmp_path / "run", [tmp_path / "set/test/images"], tmp_path / "out", quiet=True)
    assert [Image.open(path).size[::-1] for path in masks] == sizes
