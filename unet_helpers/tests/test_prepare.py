import csv
import os
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_helpers.config import DataConfig, UserError
from unet_helpers.datasets import find_samples, load_sample
from unet_helpers.prepare import expand_offline, prepare
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
            assert all((root / line[column]).is_file() for column in ("image", "mask", "field_of_view"))
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


# ---- the offline expansion

SOURCE = DataConfig(sample_images=(16, 4, 3), sample_size=32)  # as many to train and validate on as DRIVE has


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_20_become_80_of_which_12_validate_and_none_leaks(tmp_path):
    report = expand_offline(SOURCE, tmp_path / "out")
    assert "80 training" in report
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/*/*")) == [
        "test/image", "test/mask", "train/image", "train/mask",
    ]  # fmt: skip
    for seed in range(5):
        samples = find_samples(DataConfig("folder", str(tmp_path / "out"), val_share=0.15, split_seed=seed))
        assert Counter(sample.split for sample in samples) == {"train": 68, "val": 12, "test": 3}
        sides = {}
        for sample in samples:
            sides.setdefault(sample.name.split("__")[0], set()).add(sample.split)
        assert len(sides) == 23
        assert all(len(splits) == 1 for splits in sides.values())
    assert {sample.meaning for sample in samples} == {"classes"}


def test_copies_are_what_their_names_say(tmp_path):
    expand_offline(SOURCE, tmp_path)
    original = find_samples(SOURCE)[0]
    image, mask = load_sample(original)
    for kind, array in (("image", image), ("mask", mask)):
        copies = {
            change: read(tmp_path / "train" / kind / f"train_000{change}.png") for change in ("", "__hflip", "__vflip")
        }
        np.testing.assert_array_equal(copies[""], array)
        np.testing.assert_array_equal(copies["__hflip"], np.fliplr(array))
        np.testing.assert_array_equal(copies["__vflip"], np.flipud(array))
    turned = read(tmp_path / "train/mask/train_000__rotated.png")
    assert set(np.unique(turned)) <= {0, 1, 255}
    assert (turned != mask).any()
    assert turned[0, 0] == 255
    np.testing.assert_array_equal(read(tmp_path / "test/image/test_000.png"), load_sample(find_samples(SOURCE)[-3])[0])


def test_groups_of_the_source_survive_in_the_names(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        for name in (f"car{car}_{view}" for car in range(10) for view in range(3)):
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "source" / kind / f"{name}.png")
    expand_offline(DataConfig("folder", str(tmp_path / "source"), group_pattern="(car.)"), tmp_path / "out")
    samples = find_samples(DataConfig("folder", str(tmp_path / "out")))
    cars = {}
    for sample in samples:
        cars.setdefault(sample.name[:4], set()).add(sample.split)
    assert all(len(splits) == 1 for splits in cars.values())


def test_the_seed_draws_the_angles(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        expand_offline(SOURCE, tmp_path / name, seed)
    a, b, c = (read(tmp_path / name / "train/image/train_000__rotated.png") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").touch()
    (tmp_path / "file").touch()
    for output in ("there", "file", "file/below"):
        with pytest.raises(UserError, match=output):
            expand_offline(SOURCE, tmp_path / output)
    with pytest.raises(UserError, match="nowhere"):
        expand_offline(DataConfig("folder", str(tmp_path / "nowhere")), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_offline_expansion_loses_no_image_whose_names_end_alike(tmp_path):
    for split in ("train", "val", "test"):
        for number in range(3):
            retina = make_retina((len(split), number), 32)
            for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
                (tmp_path / "set" / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(tmp_path / "set" / split / kind / f"{number}.png")
    report = expand_offline(DataConfig(name="folder", root=str(tmp_path / "set")), tmp_path / "out")
    assert "24 training images" in report
    assert len(list((tmp_path / "out" / "train" / "image").iterdir())) == 24
    find_samples(DataConfig(name="folder", root=str(tmp_path / "out"), val_share=0.3))


def test_what_is_particular_about_a_public_set_is_said(tmp_path):
    cars = tmp_path / "cars"
    for kind in ("train", "train_masks"):
        (cars / kind).mkdir(parents=True)
    for car in ("0" * 12, "1" * 12, "2" * 12):
        for angle in ("01", "02"):
            image = np.full((6, 8, 3), 50 * int(car[0]) + 20 * int(angle), np.uint8)
            Image.fromarray(image).save(cars / f"train/{car}_{angle}.jpg")
            Image.fromarray(np.eye(6, 8, dtype=np.uint8) * 255).save(cars / f"train_masks/{car}_{angle}_mask.gif")
    report = prepare(DataConfig("carvana", str(cars)), tmp_path)
    assert "these are 6 of the 5088 images" in report
    assert "test: 2 images in 1 groups" in report
    assert "background 87.5%, car 12.5%" in report
    with open(tmp_path / "carvana_test.csv", newline="") as file:
        assert len({row["group"] for row in csv.DictReader(file)}) == 1
    for split in ("train", "val", "test"):
        for kind in ("", "annot"):
            (tmp_path / "streets" / (split + kind)).mkdir(parents=True)
        mask = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
        name = f"{'a' if split == 'test' else 'b'}_{split}.png"
        Image.fromarray(mask * 20).save(tmp_path / "streets" / split / name)
        Image.fromarray(mask).save(tmp_path / "streets" / f"{split}annot" / name)
    report = prepare(DataConfig("camvid", str(tmp_path)), tmp_path)
    assert "frames of one film, b, on several sides" in report
    assert "11 classes from the set's own labels; 11 ignored" in report
    assert "cyclist 9.1%" in report
    with pytest.raises(UserError, match="accept the rules"):
        prepare(DataConfig("carvana", str(tmp_path / "nowhere")), tmp_path)
