import csv
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_helpers.config import DataConfig, UserError
from unet_helpers.prepare import prepare
from unet_helpers.sample_data import make_retina


def write_drive(root: Path, count: int = 20) -> Path:
    """DRIVE's layout and formats, with drawn retinas of 32 x 32 pixels in place of its photographs."""
    for folder, kind, first in (("training", "training", 21), ("test", "test", 1)):
        for part in ("images", "1st_manual", "mask"):
            (root / folder / part).mkdir(parents=True)
        for number in range(first, first + count):
            retina = make_retina((9, number), 32)
            Image.fromarray(retina.image).save(root / folder / "images" / f"{number:02d}_{kind}.tif")
            vessels = Image.fromarray((retina.vessels == 1).astype(np.uint8) * 255)
            vessels.save(root / folder / "1st_manual" / f"{number:02d}_manual1.gif")
            view = Image.fromarray(retina.field_of_view.astype(np.uint8) * 255)
            view.save(root / folder / "mask" / f"{number:02d}_{kind}_mask.gif")
    return root


def rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stub_kagglehub(monkeypatch, download) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=download))


def test_drive_is_fetched_once_checked_and_listed(tmp_path, monkeypatch):
    archive, root, asked = tmp_path / "cache", tmp_path / "data", []
    write_drive(archive / "DRIVE")
    stub_kagglehub(monkeypatch, lambda name: asked.append(name) or str(archive))
    for _ in range(2):
        report = prepare(DataConfig("drive", str(root)), root, download=True)
    assert asked == ["zionfuo/drive2004"]
    assert "40 images" in report
    assert "binary" in report
    listed = {split: rows(root / f"drive_{split}.csv") for split in ("train", "val", "test")}
    assert {split: len(lines) for split, lines in listed.items()} == {"train": 16, "val": 4, "test": 20}
    for split, lines in listed.items():
        for line in lines:
            assert list(line) == ["image", "mask", "field_of_view", "group", "split"]
            assert line["split"] == split
            assert all(Path(line[column]).is_file() for column in ("image", "mask", "field_of_view"))
    groups = [{line["group"] for line in lines} for lines in listed.values()]
    assert len(set.union(*groups)) == 40


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    stub_kagglehub(monkeypatch, lambda name: pytest.fail("downloaded unasked"))
    with pytest.raises(UserError, match=r"kaggle\.com/datasets/zionfuo/drive2004"):
        prepare(DataConfig("drive", str(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("no\nnetwork")

    stub_kagglehub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"no network.*zionfuo/drive2004") as caught:
        prepare(DataConfig("drive", str(tmp_path / "data")), tmp_path / "out", download=True)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_drive_is_refused(tmp_path):
    write_drive(tmp_path / "DRIVE", count=3)
    with pytest.raises(UserError, match="3 training and 3 test"):
        prepare(DataConfig("drive", str(tmp_path)), tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def write_folder(root: Path) -> DataConfig:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(root / f"images/{number}.png")
        mask = np.zeros((8, 9), np.uint8)
        mask[:2], mask[2:4] = 1, 255
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    return DataConfig("folder", str(root))


def test_the_report_says_what_was_found(tmp_path):
    report = prepare(write_folder(tmp_path / "data"), tmp_path / "out")
    for text in (
        "9×8 (10)",
        "classes",
        "data.mask_values",
        "class 0 66.7%, class 1 33.3%; ignored 25.0%",
        "train: 6 images",
    ):
        assert text in report
    assert [line["split"] for line in rows(tmp_path / "out/folder_val.csv")] == ["val", "val"]


def test_the_same_picture_on_two_sides_is_pointed_out(tmp_path):
    config = write_folder(tmp_path)
    for number in range(1, 10):
        (tmp_path / f"images/{number}.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    assert "same picture" in prepare(config, tmp_path / "out")


def test_all_three_lists_or_none(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        prepare(config, tmp_path / "file")
    os.truncate(tmp_path / "data/images/9.png", 50)
    with pytest.raises(UserError, match=r"9\.png"):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sample_data_needs_no_files(tmp_path):
    report = prepare(DataConfig(sample_images=(3, 1, 1), sample_size=32), tmp_path)
    assert "5 images" in report
    assert [line["group"] for line in rows(tmp_path / "sample_test.csv")] == ["test_000"]
