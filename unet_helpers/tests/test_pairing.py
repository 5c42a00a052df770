from pathlib import Path

import pytest

from unet_helpers.config import DataConfig, UserError
from unet_helpers.pairing import groups_by_name, pair_by_name, read_drive, read_folder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a.png"),
        ("a.jpg", "a_mask.gif"),
        ("a.jpg", "mask_a.png"),
        ("img_7.png", "mask_7.png"),
        ("img7.png", "mask7.png"),
        ("01_test.tif", "01_manual1.gif"),
        ("21_training.tif", "21_manual1.gif"),
        ("a_b-c.tif", "a_b-c-seg.png"),
        ("a.tif", "a_gt.png"),
        ("a.tif", "a_segmentation.png"),
        ("000_HC.png", "000_HC_Annotation.png"),
        ("benign (4).png", "benign (4)_mask.png"),
        ("123_img.jpg", "123_label.png"),
        ("image.png", "mask.png"),
        ("A 1.JPG", "a 1_MASK.PNG"),
    ],
)
def test_usual_ways_of_naming(image, mask):
    assert pair_by_name([Path(image)], [Path("other_mask.png"), Path(mask)]) == {Path(image): Path(mask)}


def test_long_and_short_names_do_not_mix_up():
    images = [Path(name) for name in ("1.png", "11.png", "1_1.png", "01.png")]
    masks = [Path(name) for name in ("11_mask.png", "01_mask.png", "1_mask.png", "1_1_mask.png")]
    assert {i.stem: m.stem for i, m in pair_by_name(images, masks).items()} == {
        i.stem: f"{i.stem}_mask" for i in images
    }


def test_ambiguous_and_missing_masks_are_named():
    with pytest.raises(UserError, match=r"a_mask\.png.*a_label\.png"):
        pair_by_name([Path("a.jpg")], [Path("a_mask.png"), Path("a_label.png")])
    with pytest.raises(UserError, match=r"a\.(jpg|png).*a\.(jpg|png)"):
        pair_by_name([Path("a.jpg"), Path("a.png")], [Path("a.gif")])
    with pytest.raises(UserError, match=r"b\.jpg.*no mask"):
        pair_by_name([Path("a.jpg"), Path("b.jpg")], [Path("a_mask.png")])


@pytest.mark.parametrize(
    "names",
    [
        ("images/a.png", "masks/a.png"),
        ("img/a.jpg", "label/a_mask.png"),
        ("deep/down/JPEGImages/a.jpg", "deep/down/SegmentationClass/a.png"),
        ("photos/a.jpg", "ground_truth/a.png"),
        ("a.jpg", "a_mask.png"),
        ("imgs/sub/a.jpg", "masks/sub/a.png"),
        ("a/image.png", "a/mask.png"),
    ],
)
def test_layouts_without_splits(tmp_path, names):
    (pair,) = read_folder(touch(tmp_path, *names))
    assert (pair.image, pair.mask, pair.split) == (tmp_path / names[0], tmp_path / names[1], "")


@pytest.mark.parametrize(
    ("image", "mask", "split"),
    [
        ("train/image/a.png", "train/mask/a.png", "train"),
        ("x/Training/images/a.png", "x/Training/labels/a.png", "train"),
        ("images/valid/a.png", "annotations/valid/a.png", "val"),
        ("val_images/a.png", "val_masks/a.png", "val"),
        ("test/a.jpg", "testannot/a.png", "test"),
        ("train/a.jpg", "train_masks/a_mask.gif", "train"),
    ],
)
def test_layouts_with_splits(tmp_path, image, mask, split):
    (pair,) = read_folder(touch(tmp_path, image, mask, ".cache/b.png", "__MACOSX/c.png", "notes.txt"))
    assert (pair.image, pair.mask, pair.split) == (tmp_path / image, tmp_path / mask, split)


def test_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        read_folder(tmp_path / "empty")
    with pytest.raises(UserError, match=r"b\.png.*no mask"):
        read_folder(touch(tmp_path / "one", "images/a.png", "images/b.png", "masks/a.png"))
    with pytest.raises(UserError, match=r"b_mask\.png.*no image"):
        read_folder(touch(tmp_path / "two", "images/a.png", "masks/a.png", "masks/b_mask.png"))
    with pytest.raises(UserError, match="no mask"):
        read_folder(touch(tmp_path / "three", "images/a.png"))


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


def groups(root: Path, *stems: str, pattern: str = DataConfig.group_pattern) -> list[str]:
    names = [
        f"{split}/{kind}/{name}.png"
        for split, name in (stem.split("/") for stem in stems)
        for kind in ("image", "mask")
    ]
    pairs = read_folder(touch(root, *names))
    found = dict(
        zip((f"{pair.split}/{pair.image.stem}" for pair in pairs), groups_by_name(pairs, pattern), strict=True)
    )
    return [found[stem] for stem in stems]


def test_groups_by_name(tmp_path):
    assert groups(tmp_path / "1", "train/a", "train/a__hflip", "train/b") == ["a", "a", "train/b"]
    assert groups(tmp_path / "2", "train/0", "test/0") == ["train/0", "test/0"]  # two pictures that share a number
    assert groups(tmp_path / "3", "train/0__vflip", "test/0") == ["0", "0"]  # a copy says that the name counts
    assert groups(tmp_path / "4", "train/car1_01", "test/car1_02", pattern=r"(car\d)_") == ["car1", "car1"]
    for pattern in ("(.{12})", "a", "(a"):
        with pytest.raises(UserError, match="group_pattern"):
            groups(tmp_path / "5", "train/a", pattern=pattern)
