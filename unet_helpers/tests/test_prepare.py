import csv
import errno
import os
import shlex
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from unet_helpers.__main__ import parse
from unet_helpers.config import DataConfig, RunError, UserError
from unet_helpers.datasets import find_samples, load_sample
from unet_helpers.prepare import _rotate as rotate
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
    again = find_samples(DataConfig("folder", str(root / "drive_test.csv"), val_share=0, test_share=0.2))
    known = {sample.image: sample for sample in find_samples(DataConfig("drive", str(root)))}
    assert len(again) == 20
    for sample in again:  # the field of view came along
        np.testing.assert_array_equal(load_sample(sample)[1], load_sample(known[sample.image])[1])


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    stub_kagglehub(monkeypatch, lambda name: pytest.fail("downloaded unasked"))
    with pytest.raises(UserError, match=r"kaggle\.com/datasets/zionfuo/drive2004"):
        prepare(DataConfig("drive", str(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_drive_is_not_replaced_by_it(tmp_path, monkeypatch):
    stub_kagglehub(monkeypatch, lambda name: pytest.fail("downloaded all the same"))
    (tmp_path / "DRIVE" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="DRIVE: is in the way"):
        prepare(DataConfig("drive", str(tmp_path)), tmp_path / "out", download=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["DRIVE", "mine"]


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


@pytest.mark.parametrize(
    ("names", "heads"),
    [
        (["TCGA_0_1", "TCGA_0_2", "TCGA_1_1", "TCGA_1_2", "TCGA_1_3", "TCGA_2_1", "TCGA_2_2"], "TCGA_1... (3); TCGA_0"),
        (["p1/slice1", "p1/slice2", "p1/slice3", "p2/slice1", "p2/slice2", "p2/slice3"], "p1/slice... (3); p2/slice"),
        (["eye1_left", "eye1_right", "eye2_left", "eye2_right", "eye3_left", "eye3_right"], "eye1... (2)"),
        (["a_jpg.rf.0f", "a_jpg.rf.1b", "b_jpg.rf.2c", "b_jpg.rf.3d", "c_jpg.rf.aa", "c_jpg.rf.bb"], "_jpg... (2)"),
        (["IMG_1", "IMG_2", "IMG_3", "IMG_4", "IMG_5", "IMG_6"], ""),
        (["train/1", "train/2", "train/3", "test/4", "test/5", "test/6"], ""),
        (["a", "b", "c", "d", "e", "f"], ""),
        (["p1__1", "p1__2", "p2__1", "p2__2", "p3__1", "p3__2"], ""),  # the default pattern has seen it
    ],
)
def test_names_that_look_like_groups_are_pointed_out(tmp_path, names, heads):
    rng = np.random.default_rng(0)
    for name in names:
        for ending in (".png", "_mask.png"):
            path = tmp_path / "data" / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = (
                rng.integers(0, 2, (8, 8), np.uint8) if "mask" in ending else rng.integers(0, 256, (8, 8, 3), np.uint8)
            )
            Image.fromarray(values).save(path)
    report = prepare(DataConfig("folder", str(tmp_path / "data")), tmp_path / "out")
    assert ("its own group" in report) == bool(heads)
    assert heads in report


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
    config, before = write_folder(tmp_path / "whole"), {}
    for val_share in (0.2, 0.4):  # at first no lists are there, then those of another split
        config.val_share = val_share
        for moment in range(3):
            with monkeypatch.context() as patch:
                full = OSError(errno.ENOSPC, "No space left on device")
                patch.setattr(os, "fsync", Mock(side_effect=[None] * moment + [full]))
                with pytest.raises(RunError, match=r"folder_\w+\.csv.*make room"):
                    prepare(config, tmp_path / "out")
            assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        prepare(config, tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert len(before) == 4


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


def test_mask_and_image_are_turned_alike():
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 15:60] = 1
    for angle in (-30, 12):
        image, turned = rotate(np.repeat(mask[..., None] * 200, 3, 2), mask, angle)
        assert ((image[..., 0] > 100) == (turned == 1))[turned != 255].mean() > 0.99
        assert 0 < (turned == 255).mean() < 0.5  # the corners


def test_groups_of_the_source_survive_in_the_names(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        for name in (f"car{car}_{view}" for car in range(10) for view in range(3)):
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "source" / kind / f"{name}.png")
    expand_offline(DataConfig("folder", str(tmp_path / "source"), group_pattern="(car.)"), tmp_path / "out")
    samples = find_samples(DataConfig("folder", str(tmp_path / "out")))
    cars = {}
    for sample in samples:
        cars.setdefault(Path(sample.image).name[:4], set()).add(sample.split)
    assert len(cars) == 10
    assert all(len(splits) == 1 for splits in cars.values())


@pytest.mark.parametrize("group", ["..\\..\\evil", "../../evil", "C:evil", "a\0b"])
def test_a_group_is_no_path(tmp_path, monkeypatch, group):
    config = write_folder(tmp_path / "source")
    samples = [replace(sample, group=group) for sample in find_samples(config)]
    monkeypatch.setattr("unet_helpers.prepare.find_samples", lambda config: samples)
    expand_offline(config, tmp_path / "out")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "source" not in path.parents]
    assert written
    assert all(tmp_path / "out" in path.parents and not set("\\:") & set(path.name) for path in written)


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
    config = write_folder(tmp_path / "set")
    last = Path(find_samples(config)[-1].image)
    os.truncate(last, 50)
    with pytest.raises(UserError, match=last.name):  # when the copies of all others have been written
        expand_offline(config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "set", "there"]


def test_images_whose_copies_would_have_one_name_are_not_expanded(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        for name in ("a_b", "a__b"):
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "source" / kind / f"{name}.png")
    config = DataConfig("folder", str(tmp_path / "source"), group_pattern="(.*)", val_share=0, test_share=0)
    with pytest.raises(UserError, match=r"a_+b\.png: another image would also be called a_b\.png"):
        expand_offline(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


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
    assert "these are 6 of the 5088 images, 2 to 2 a group" in report
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
    write_drive(tmp_path / "rite" / "DRIVE", 5)
    colours = Image.fromarray(np.eye(32, dtype=np.uint8)[..., None] * np.array([255, 0, 0], np.uint8))
    for split, numbers in (("training", range(21, 26)), ("test", range(1, 6))):
        (tmp_path / "rite" / "AV_groundTruth" / split / "av").mkdir(parents=True)
        for number in numbers:
            colours.save(tmp_path / "rite" / "AV_groundTruth" / split / "av" / f"{number:02d}_{split}.png")
    assert "test images follow DRIVE's second observer" in prepare(DataConfig("rite", str(tmp_path)), tmp_path)
    with pytest.raises(UserError, match="accept the rules"):
        prepare(DataConfig("carvana", str(tmp_path / "nowhere")), tmp_path)


# ---- what looks suspicious, and the sheet


def note(report: str, words: str) -> str:
    (line,) = [line for line in report.splitlines() if words in line]
    return line


def test_suspicious_files_are_named_in_one_line_a_kind(tmp_path):
    config, root = write_folder(tmp_path / "set"), tmp_path / "set"
    quiet = prepare(config, tmp_path / "out")
    assert "note" not in quiet
    for number in range(1, 6):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(root / f"masks/{number}.png")
    split_of = {sample.name: sample.split for sample in find_samples(config)}
    train = [name for name, split in split_of.items() if split == "train"]
    (test,) = [name for name, split in split_of.items() if split == "test"][:1]
    one, two, three = train[:3]
    (root / f"images/{two}.png").write_bytes((root / f"images/{one}.png").read_bytes())
    (root / f"images/{test}.png").write_bytes((root / f"images/{three}.png").read_bytes())
    drawn = np.array(Image.open(root / f"masks/{two}.png"))
    drawn[-1, -1] = 1
    Image.fromarray(drawn).save(root / f"masks/{two}.png")
    report = prepare(config, tmp_path / "out")
    empty = note(report, "no foreground")
    assert empty.count(".png") == 3
    assert empty.endswith(f"and {sum(1 for n in range(1, 6) if str(n) != two) - 3} more")
    leak = note(report, "two splits")
    assert f"{test}.png (test)" in leak
    assert f"{three}.png (train)" in leak
    assert f"{two}.png" in note(report, "two masks")


def test_an_orientation_that_only_the_image_or_only_the_mask_has_is_pointed_out(tmp_path):
    config, exif = write_folder(tmp_path / "set"), Image.Exif()
    exif[0x0112] = 3  # upside down: the sizes agree
    path = tmp_path / "set/images/4.png"
    Image.open(path).copy().save(path, exif=exif)
    assert "4.png" in note(prepare(config, tmp_path / "out"), "EXIF")
    mask = tmp_path / "set/masks/4.png"
    Image.open(mask).copy().save(mask, exif=exif)
    assert "EXIF" not in prepare(config, tmp_path / "out")


def test_the_palette_is_shown_and_stray_colours_are_pointed_out(tmp_path):
    config = write_folder(tmp_path / "set")
    for number in range(10):
        mask = np.zeros((150, 80, 3), np.uint8)
        mask[:50], mask[50:60] = (255, 0, 0), (0, 0, 255)
        mask[0, 0] = (254, 0, 0) if number == 3 else mask[0, 0]
        Image.fromarray(mask).save(tmp_path / f"set/masks/{number}.png")
        Image.new("RGB", (80, 150), (number, 9, 9)).save(tmp_path / f"set/images/{number}.png")
    report = prepare(config, tmp_path / "out")
    colours = "colours, #000000 = class 0, #0000ff = class 1, #fe0000 = class 2, #ff0000 = class 3"
    assert colours in note(report, "mask values")
    assert "class 2 (1 pixels)" in note(report, "hardly occur")
    assert note(report, "next: ").endswith("--model.num_classes 4")
    config.palette, config.root = ("#000000", "#fe0000", "#ff0000", "#0000ff", "#00ff00"), config.root + "/x y/.."
    (tmp_path / "set/x y").mkdir()
    report = prepare(config, tmp_path / "out")
    assert "#000000 = class 0, #fe0000 = class 1, #ff0000 = class 2" in report
    words = shlex.split(note(report, "next: ").removeprefix("next: python -m unet_helpers "))
    args = parse(words)["train"]
    assert (args.data.root, args.data.palette, args.model.num_classes) == (config.root, config.palette, 5)


def test_the_sheet_shows_a_dozen_images_under_their_masks(tmp_path):
    config = write_folder(tmp_path / "set")
    for number in range(10):
        Image.new("RGB", (120, 60), (90, 90, 90)).save(tmp_path / f"set/images/{number}.png")
        mask = np.zeros((60, 120), np.uint8)
        mask[:, 60:] = 1
        Image.fromarray(mask).save(tmp_path / f"set/masks/{number}.png")
    prepare(config, tmp_path / "out")
    sheet = np.array(Image.open(tmp_path / "out/folder_sheet.png")).astype(int)
    orange = (np.abs(sheet - (213, 94, 0)).sum(2) < 10).sum()
    tinted = (sheet == np.round(0.65 * 90 + 0.35 * np.array([213, 94, 0]))).all(2).sum()
    assert tinted + orange == pytest.approx(10 * 120 * 120, rel=0.02)  # half of each, twice as large a side
    assert (sheet == 90).all(2).sum() == pytest.approx(10 * 120 * 120, rel=0.02)


def test_a_list_that_prepare_wrote_can_be_read_and_moved_with_its_files(tmp_path):
    config = write_folder(tmp_path / "set")
    prepare(config, tmp_path / "set")
    lines = rows(tmp_path / "set/folder_train.csv")
    assert {line["image"].split(os.sep)[0] for line in lines} == {"images"}
    (tmp_path / "set").rename(tmp_path / "moved")
    samples = find_samples(DataConfig("folder", str(tmp_path / "moved/folder_train.csv")))
    assert sorted(Path(sample.image).stem for sample in samples) == sorted(Path(line["image"]).stem for line in lines)
    assert {sample.group for sample in samples} == {line["group"] for line in lines}
    every = (tmp_path / f"moved/folder_{split}.csv" for split in ("train", "val", "test"))
    text = [line for number, path in enumerate(every) for line in path.read_text().splitlines()[number > 0 :]]
    (tmp_path / "moved/pairs.csv").write_text("\n".join(text))
    samples = find_samples(DataConfig("folder", str(tmp_path / "moved")))
    assert Counter(sample.split for sample in samples) == {"train": 6, "val": 2, "test": 2}
    assert {
        sample.split for sample in samples if Path(sample.image).stem in {Path(x["image"]).stem for x in lines}
    } == {"train"}
