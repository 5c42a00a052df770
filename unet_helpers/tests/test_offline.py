from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_helpers.config import DataConfig, UserError
from unet_helpers.datasets import find_samples, load_sample
from unet_helpers.offline import expand_offline

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
