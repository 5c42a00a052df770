import errno
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_helpers.config import DataConfig, UserError
from unet_helpers.pairing import (
    assert_disjoint,
    assign_splits,
    groups_by_name,
    k_folds,
    pair_by_name,
    read_folder,
    split_by_group,
)


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
        ("IMG_1234.JPG", "IMG_1234_mask.png"),
        ("image_001.png", "image_001_mask.png"),
        ("frame_0001.png", "frame_0001_label.png"),
        ("photo (1).jpg", "photo (1)_mask.png"),
        ("train_1.png", "train_1_mask.png"),
        ("a.png", "a_ground_truth.png"),
        ("a.png", "ground-truth-a.png"),
    ],
)
def test_usual_ways_of_naming(image, mask):
    assert pair_by_name([Path(image)], [Path("other_mask.png"), Path(mask)]) == {Path(image): Path(mask)}


def test_many_files_are_paired_in_seconds():
    images = [Path(f"{number}.jpg") for number in range(20_000)]
    started = time.process_time()
    found = pair_by_name(images, [Path(f"{number}.png") for number in range(20_000)])
    assert time.process_time() - started < 15  # about one; a list searched for each name takes minutes
    assert found[Path("77.jpg")] == Path("77.png")


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
        ("scan 1_left.jpg", "scan 1_left_mask.png"),
        ("imgs/sub/a.jpg", "masks/sub/a.png"),
        ("a/image.png", "a/mask.png"),
        ("images/a.png", "image_masks/a.png"),
        ("img/a.png", "img_masks/a.png"),
        ("IMG_1.jpg", "IMG_1_mask.png"),
        ("a.jpg", "a_ground_truth.png"),
        ("Original/0.tif", "Ground Truth/0.tif"),
        ("people_segmentation/images/a.png", "people_segmentation/masks/a.png"),
        ("lgg-mri-segmentation/one/a_1.tif", "lgg-mri-segmentation/one/a_1_mask.tif"),
        ("images/frames/a.png", "masks/frames/a.png"),
        ("images/a.jpg", "annotations/trimaps/a.png"),
        ("7_sat.jpg", "7_mask.png"),
        ("plant1_rgb.png", "plant1_label.png"),
        ("a.tif", "a-labelled.png"),
        ("images/01_h.jpg", "manual1/01_h.tif"),
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
        ("train_set/images/a.png", "train_set/masks/a.png", "train"),
        ("testdata/img/a.jpg", "testdata/mask/a.png", "test"),
    ],
)
def test_layouts_with_splits(tmp_path, image, mask, split):
    (pair,) = read_folder(touch(tmp_path, image, mask, ".cache/b.png", "__MACOSX/c.png", "notes.txt"))
    assert (pair.image, pair.mask, pair.split) == (tmp_path / image, tmp_path / mask, split)


def test_a_field_of_view_and_a_second_mask_are_named(tmp_path):
    touch(tmp_path / "hrf", "images/01_h.jpg", "manual1/01_h.tif", "mask/01_h_mask.tif")
    with pytest.raises(
        UserError, match=r"mask.01_h_mask\.tif: no image is left for it: .* move it, or write pairs\.csv"
    ):
        read_folder(tmp_path / "hrf")
    touch(tmp_path / "busi", "benign (4).png", "benign (4)_mask.png", "benign (4)_mask_1.png")
    with pytest.raises(UserError, match=r"benign \(4\)_mask_1\.png: no image is left for it: rename, merge"):
        read_folder(tmp_path / "busi")


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


# ---- splits


CARS = [f"car{number:02d}" for number in range(20) for _ in range(4)]
SHARES = {"val": 0.2, "test": 0.1}
group_lists = st.lists(st.sampled_from([f"g{number}" for number in range(30)]), min_size=40, max_size=120).filter(
    lambda groups: len(set(groups)) >= 5
)


@settings(max_examples=50, deadline=None)
@given(groups=group_lists, seed=st.integers(0, 1000), shuffle=st.randoms())
def test_no_group_is_on_two_sides_in_any_order_of_the_files(groups, seed, shuffle):
    order = list(range(len(groups)))
    shuffle.shuffle(order)
    for draw in (lambda names: split_by_group(names, SHARES, seed), lambda names: k_folds(names, 4, seed)):
        sides = draw(groups)
        assert all(len({side for g, side in zip(groups, sides, strict=True) if g == group}) == 1 for group in groups)
        assert_disjoint(groups, sides)
        assert draw([groups[place] for place in order]) == [sides[place] for place in order]


def test_shares_are_shares_of_the_groups_and_the_seed_matters():
    splits = split_by_group(CARS, SHARES, 0)
    assert [splits.count(name) for name in ("train", "val", "test")] == [56, 16, 8]
    assert splits == split_by_group(CARS, SHARES, 0)
    assert splits != split_by_group(CARS, SHARES, 1)


def test_the_split_of_a_seed_is_the_same_on_every_machine():
    groups = [f"{number}_training" for number in range(21, 41)]
    splits = split_by_group(groups, {"val": 0.2, "test": 0.0}, 0)
    assert [group[:2] for group, split in zip(groups, splits, strict=True) if split == "val"] == [
        "23",
        "25",
        "27",
        "40",
    ]


def test_folds_are_even_and_each_group_validates_once():
    folds = k_folds(CARS, 5, 0)
    assert [folds.count(fold) for fold in range(5)] == [16] * 5
    assert k_folds(CARS, 5, 1) != folds
    uneven = ["a"] * 2 + ["b"] * 6 + ["c"] * 2 + ["d"] * 2  # by hand: b against the rest
    for seed in range(5):
        assert [k_folds(uneven, 2, seed).count(fold) for fold in range(2)] == [6, 6]


def test_too_few_groups_and_senseless_shares():
    for draw in (
        lambda: split_by_group(["a", "a", "b"], SHARES, 0),
        lambda: split_by_group(CARS, {"val": 0.6, "test": 0.4}, 0),
        lambda: split_by_group(CARS, {"val": -0.1, "test": 0.4}, 0),
        lambda: k_folds(["a", "b"], 3, 0),
        lambda: k_folds(["a", "b"], 1, 0),
    ):
        with pytest.raises(UserError):
            draw()


def test_a_leak_is_named():
    with pytest.raises(UserError, match=r"car7.*train.*test"):
        assert_disjoint(["car7", "car8", "car7"], ["train", "train", "test"])


def test_splits_that_the_data_brings_are_kept_and_the_others_drawn():
    config = DataConfig(val_share=0.25, test_share=0.25)
    groups = [f"g{number}" for number in range(12)]
    assert assign_splits(groups, ["train"] * 4 + ["val"] * 4 + ["test"] * 4, config) == (
        ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    )
    splits = assign_splits(groups, ["train"] * 8 + ["test"] * 4, config)
    assert splits[8:] == ["test"] * 4
    assert (splits.count("train"), splits.count("val")) == (6, 2)
    splits = assign_splits(groups, [""] * 12, config)
    assert [splits.count(name) for name in ("train", "val", "test")] == [6, 3, 3]


def test_folds_pool_training_and_validation_but_never_touch_the_test():
    groups = [f"g{number}" for number in range(12)]
    validating = []
    for fold in range(4):
        splits = assign_splits(groups, ["train"] * 6 + ["val"] * 2 + ["test"] * 4, DataConfig(folds=4, fold=fold))
        assert splits[8:] == ["test"] * 4
        validating += [group for group, split in zip(groups, splits, strict=True) if split == "val"]
    assert sorted(validating) == sorted(groups[:8])


def test_a_group_in_two_folders_is_refused():
    with pytest.raises(UserError, match="'a'"):
        assign_splits(["a", "b", "c", "a"], ["train", "train", "val", "test"], DataConfig())


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    real = tmp_path / "elsewhere"
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (real / split / kind).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(real / split / kind / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(real / "train", target_is_directory=True)
    (root / "test").symlink_to(real / "test", target_is_directory=True)
    (root / "circle").symlink_to(root, target_is_directory=True)
    (root / "train" / "again").symlink_to(root / "train" / "images", target_is_directory=True)
    assert [pair.split for pair in read_folder(root)] == ["test", "train"]


# ---- lists


def write_list(root: Path, text: str, *names: str, encoding="utf-8") -> Path:
    touch(root, *names)
    (root / "pairs.csv").write_bytes(text.encode(encoding))
    return root / "pairs.csv"


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_list_says_what_belongs_together(tmp_path, mark, encoding, end):
    lines = [
        ("Image", "mask ", "split", "group", "remark"),
        ("a/x.png", "b/7.png", "Training", "eye 1", ""),
        ("a/y.png", "./b/../b/8.png", "", "", "blurred"),
        ("a\\z.png", "b\\9.png", "", "", "written on Windows"),
    ]
    text = end.join(mark.join(line) for line in lines) + end
    path = write_list(
        tmp_path, text, "a/x.png", "a/y.png", "a/z.png", "b/7.png", "b/8.png", "b/9.png", "a/no.png", encoding=encoding
    )
    pairs = read_folder(path)
    assert [(pair.image, pair.mask) for pair in pairs] == [
        (tmp_path / "a/x.png", tmp_path / "b/7.png"),
        (tmp_path / "a/y.png", tmp_path / "b/8.png"),
        (tmp_path / "a/z.png", tmp_path / "b/9.png"),
    ]
    expected = [("train", "eye 1", ("a",)), ("", "", ("a",)), ("", "", ("a",))]
    assert [(pair.split, pair.group, pair.folders) for pair in pairs] == expected
    assert groups_by_name(pairs, DataConfig.group_pattern) == ["eye 1", "a/y", "a/z"]
    assert read_folder(tmp_path) == pairs  # a list called pairs.csv need not be named


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image,mask\n../x.png,m.png\n", r"pairs\.csv line 2.*\.\./x\.png lies outside"),
        ("image,mask\na.png,/etc/passwd\n", r"line 2.*/etc/passwd lies outside"),
        ("image,mask\na.png,sub/../../set2/m.png\n", r"line 2.*lies outside"),
        ("image,mask\na.png,m.png\nb.png,n.png\n", r"line 3.*no file `b\.png`"),
        ("image,mask\na.png\n", r"line 2.*no file ``"),
        ("image,mask\na.png,m.png\na.png,sub/s.png\n", r"line 3.*a\.png has the name of an image above"),
        ("image,mask,split\na.png,m.png,holdout\n", r"line 2.*no split `holdout`"),
        ("image,mask\na.png,m,n.png\n", "line 2.*no file `m`"),
        ("image,label\na.png,m.png\n", "column names"),
        ("image,mask\n", "a line for each image"),
        ("", "column names"),
        ("image,mask\n\0,m.png\n", "line 2|cannot be read"),
        (f"image,mask\n{'a' * 5000}.png,m.png\n", "line 2.*no file"),
        (f"image,mask\n{'a' * 200_000}.png,m.png\n", "cannot be read as a list"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_its_line(tmp_path, text, problem):
    touch(tmp_path, "x.png", "set2/m.png")
    path = write_list(tmp_path / "set", text, "a.png", "m.png", "sub/s.png")
    with pytest.raises(UserError, match=problem) as caught:
        read_folder(path)
    assert "\n" not in str(caught.value)


def test_a_list_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(UserError, match="UTF-8"):
        read_folder(write_list(tmp_path, "image,mask\nMüller.png,m.png\n", encoding="latin-1"))


# ---- names


def test_names_in_both_unicode_forms_belong_together(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, 'Müller\'s "ö" é') for form in ("NFC", "NFD"))
    assert composed != decomposed
    for image, mask in ((composed, decomposed), (decomposed, composed)):
        assert pair_by_name([Path(f"{image}.jpg")], [Path(f"{mask}_mask.png")])
        exact, other = Path(f"{mask}.png"), Path(f"{mask}_mask.png")
        assert list(pair_by_name([Path(f"{image}.jpg")], [other, exact]).values()) == [exact]
        root = tmp_path / str(len(image))
        write_list(root, f'image,mask\n"{mask.replace(chr(34), chr(34) * 2)}.png",m.png\n', f"{image}.png", "m.png")
        assert read_folder(root)[0].image.is_file()


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, "images/a.png", "masks/a.png", "images/more/b.png", "masks/more/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"more: cannot be read \(Permission denied\)"):
        read_folder(tmp_path)


def test_the_sheet_that_prepare_draws_is_no_image_of_the_set(tmp_path):
    touch(tmp_path, "a.png", "a_mask.png", "folder_sheet.png")
    assert [pair.image.name for pair in read_folder(tmp_path)] == ["a.png"]
