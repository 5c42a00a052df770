import dataclasses
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from unet_helpers.augmentation import make_augmentation
from unet_helpers.config import IGNORE, AugmentationConfig

RNG = np.random.default_rng(0)
PLAIN = AugmentationConfig(
    patch_size=32, flips=False, rotation=0, scale=(1, 1), elastic=0, brightness=0, contrast=0, gamma=0, noise=0
)
GEOMETRY = dataclasses.replace(PLAIN, flips=True, rotation=180, scale=(0.7, 1.4), elastic=0.5)
FULL = AugmentationConfig(patch_size=32, elastic=0.5, gamma=0.2)


def blobs(height: int, width: int) -> np.ndarray:
    """A mask of classes 0 and 3 whose regions are much larger than a pixel."""
    y, x = np.mgrid[:height, :width]
    return np.where(np.sin(x / 5) + np.cos(y / 7) > 0.3, 3, 0).astype(np.uint8)


def everything(mask: np.ndarray) -> np.ndarray:
    return np.ones(mask.shape, bool)


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_image_and_mask_go_through_the_same_geometry(elastic):
    mask = blobs(70, 90)
    image = np.repeat(np.where(mask == 3, 240, 20).astype(np.uint8)[..., None], 3, axis=2)
    augment = make_augmentation(dataclasses.replace(GEOMETRY, elastic=elastic))
    agreeing = total = black = 0
    for seed in range(40):
        patch, target, view = augment(image, mask, everything(mask), seed)
        scored = target != IGNORE
        np.testing.assert_array_equal(view, scored)  # both end where the image ends
        outside = cv2.dilate(view.astype(np.uint8), np.ones((3, 3))) == 0  # where nothing of the image is mixed in
        assert (patch[outside] == 0).all()
        black += outside.sum()
        agreeing += ((patch[..., 0] > 130) == (target == 3))[scored].sum()
        total += scored.sum()
    assert agreeing / total > 0.98  # they differ at most where linear and nearest round differently
    assert black > 1000


def test_no_label_is_invented_however_the_patch_is_turned():
    mask = RNG.choice(np.array([0, 3, 7, IGNORE], np.uint8), (40, 50))
    image = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    augment = make_augmentation(dataclasses.replace(FULL, elastic=0.5))
    seen = set()
    for seed in range(30):
        patch, target, view = augment(image, mask, everything(mask), seed)
        assert (patch.dtype, target.dtype, view.dtype) == (np.uint8, np.uint8, bool)
        assert (patch.shape, target.shape, view.shape) == ((32, 32, 3), (32, 32), (32, 32))
        assert (target[~view] == IGNORE).all()
        seen |= set(np.unique(target).tolist())
    assert seen == {0, 3, 7, IGNORE}


def test_without_any_change_a_patch_is_an_exact_cut():
    for size in (31, 32):
        image = RNG.integers(0, 256, (80, 70, 3), dtype=np.uint8)
        mask = np.arange(80 * 70, dtype=np.uint32).reshape(80, 70) % 250
        augment = make_augmentation(dataclasses.replace(PLAIN, patch_size=size))
        for seed in range(5):
            patch, target, view = augment(image, mask.astype(np.uint8), everything(mask), seed)
            rows, columns = np.flatnonzero(view.any(axis=1)), np.flatnonzero(view.any(axis=0))
            inside = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            windows = np.lib.stride_tricks.sliding_window_view(image, inside.shape)[:, :, 0]
            places = np.argwhere((windows == inside).all(axis=(2, 3, 4)))
            assert len(places) == 1
            y, x = places[0]
            np.testing.assert_array_equal(target[view], mask[y : y + len(rows), x : x + len(columns)].ravel())


@pytest.mark.parametrize("size", [(20, 30), (21, 31), (24, 30), (33, 64)])
def test_a_patch_as_large_as_the_image_holds_all_of_it(size):
    mask = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    image = np.dstack([mask // 200, mask % 200, mask * 0]).astype(np.uint8)
    augment = make_augmentation(dataclasses.replace(PLAIN, patch_size=size))
    places = set()
    for seed in range(60):
        patch, target, view = augment(image, mask.astype(np.uint8), everything(mask), seed)
        assert patch.shape[:2] == target.shape == size
        top, left = np.argwhere(view)[0].tolist()
        np.testing.assert_array_equal(patch[top : top + 20, left : left + 30], image)
        assert view.sum() == 600
        places.add((top, left))
    tops, lefts = zip(*places, strict=True)
    assert (min(tops), min(lefts)) == (0, 0)  # it is moved as far as there is room
    assert max(tops) == size[0] - 20 or size[0] > 24
    assert max(lefts) == size[1] - 30 or size[1] > 31


def test_patches_that_are_not_square():
    mask = np.arange(80, dtype=np.uint8)[:, None].repeat(90, axis=1)
    for config in (PLAIN, FULL):
        config = dataclasses.replace(config, patch_size=(16, 40))
        patch, target, view = make_augmentation(config)(np.dstack([mask] * 3), mask, everything(mask), 5)
        assert patch.shape == (16, 40, 3)
        assert target.shape == view.shape == (16, 40)
    assert make_augmentation(dataclasses.replace(FULL, elastic=1.0, patch_size=(16, 40)))(
        np.dstack([mask] * 3), mask, everything(mask), 5
    )[1].shape == (16, 40)


def test_flips_happen_independently_of_each_other():
    ramp = np.arange(64, dtype=np.uint8)
    image = np.dstack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)])
    augment = make_augmentation(dataclasses.replace(PLAIN, flips=True, patch_size=8))
    kinds = []
    for seed in range(200):
        patch, _, view = augment(image, image[..., 2], np.ones((64, 64), bool), seed)
        if view.all():
            patch = patch.astype(int)
            kinds.append((bool(patch[0, 1, 0] < patch[0, 0, 0]), bool(patch[1, 0, 1] < patch[0, 0, 1])))
    for kind in ((False, False), (False, True), (True, False), (True, True)):
        assert 0.1 < kinds.count(kind) / len(kinds) < 0.4


def test_horizontal_flips_never_turn_a_picture_upside_down():
    ramp = np.arange(64, dtype=np.uint8)
    image = np.dstack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)])
    augment = make_augmentation(dataclasses.replace(PLAIN, flips="horizontal", patch_size=8))
    patches = [augment(image, image[..., 2], np.ones((64, 64), bool), seed) for seed in range(100)]
    whole = [patch.astype(int) for patch, _, view in patches if view.all()]
    assert all(patch[1, 0, 1] > patch[0, 0, 1] for patch in whole)
    assert {bool(patch[0, 1, 0] > patch[0, 0, 0]) for patch in whole} == {True, False}


def test_angles_in_degrees_and_magnifications_reach_their_limits():
    """The direction in which a ramp rises, and how steeply: less so the larger the picture is shown."""
    image = np.tile(np.linspace(0, 1, 200, dtype=np.float32), (200, 1))[..., None].repeat(3, 2)
    mask = np.zeros((200, 200), np.uint8)
    augment = make_augmentation(dataclasses.replace(PLAIN, rotation=10, scale=(0.8, 1.2)))
    angles, magnifications = [], []
    for seed in range(60):
        patch, _, view = augment(image, mask, everything(mask), seed)
        if view.all():
            down, across = (slope.mean() for slope in np.gradient(patch[..., 0].astype(float)))
            angles.append(abs(np.degrees(np.arctan2(down, across))))
            magnifications.append(1 / (199 * np.hypot(down, across)))
    assert 7 < max(angles) < 10.1
    assert 0.799 < min(magnifications) < 0.83
    assert 1.17 < max(magnifications) < 1.201


def test_noise_and_gamma_are_as_strong_as_they_say_at_most():
    flat = np.full((40, 40, 3), 128, np.uint8)
    noisy = make_augmentation(dataclasses.replace(PLAIN, patch_size=30, noise=0.02))
    patches = [noisy(flat, flat[..., 0], everything(flat[..., 0]), seed) for seed in range(60)]
    deviations = [patch[view].astype(float).std() / 255 for patch, _, view in patches if view.sum() > 100]
    assert 0.015 < max(deviations) < 0.022
    assert min(deviations) < 0.006
    curved = make_augmentation(dataclasses.replace(PLAIN, patch_size=1, gamma=0.2))
    values = [curved(flat // 2, flat[..., 0], everything(flat[..., 0]), seed)[0].mean() for seed in range(60)]
    assert 255 * (64 / 255) ** 1.2 - 1 <= min(values) < 52
    assert 80 < max(values) <= 255 * (64 / 255) ** 0.8 + 1


def test_what_gets_too_dark_or_too_bright_stays_black_or_white():
    dark, bright = np.full((9, 9, 3), 5, np.uint8), np.full((9, 9, 3), 250, np.uint8)
    augment = make_augmentation(dataclasses.replace(PLAIN, patch_size=1, brightness=0.1, contrast=0.2))
    values = [[augment(one, one[..., 0], everything(one[..., 0]), n)[0] for n in range(60)] for one in (dark, bright)]
    assert np.max(values[0]) < 40
    assert np.min(values[1]) > 170


def test_an_elastic_deformation_moves_pixels_by_some_ten_of_512():
    """Ronneberger et al. 2015: displacements on a coarse grid with a standard deviation of 10 pixels."""
    ramp = np.tile(np.arange(0, 256, 0.5).astype(np.float32) / 256, (512, 1))[..., None].repeat(3, 2)
    augment = make_augmentation(dataclasses.replace(PLAIN, patch_size=512, elastic=1.0))
    mask, moved = np.zeros((512, 512), np.uint8), []
    for seed in range(12):
        patch, _, view = augment(ramp, mask, everything(mask), seed)
        moved.append(512 * (patch[..., 0] - ramp[..., 0])[view].std())
    assert 3 < np.mean(moved) < 12


def test_the_edge_of_the_image_is_seen_half_as_often_as_its_middle():
    mask = np.arange(100, dtype=np.uint8)[None].repeat(100, axis=0)  # each pixel holds its column
    augment = make_augmentation(PLAIN)
    seen = np.zeros(256)
    for seed in range(600):
        seen += np.bincount(
            augment(mask[..., None].repeat(3, 2), mask, everything(mask), seed)[1].ravel(), minlength=256
        )
    assert 0.35 < seen[:3].mean() / seen[45:55].mean() < 0.65


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (31, 200), (584, 565)])
def test_any_image_size_fits_any_patch(shape):
    image, mask = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), np.zeros(shape, np.uint8)
    for config in (FULL, dataclasses.replace(FULL, patch_size=97), dataclasses.replace(GEOMETRY, patch_size=1)):
        patch, target, _ = make_augmentation(config)(image, mask, everything(mask), 0)
        assert patch.shape[:2] == target.shape == (config.patch_size,) * 2


@pytest.mark.parametrize(("shape", "scale"), [((1, 1), (0.78, 1.28)), ((9, 16), (1, 3)), ((1, 90), (1, 3))])
def test_a_patch_may_lie_beside_a_small_image(shape, scale):
    """One in some hundred patches whose centre lies outside holds nothing of an image much smaller than they are."""
    image, mask = RNG.integers(1, 256, (*shape, 3), dtype=np.uint8), np.ones(shape, np.uint8)
    augment = make_augmentation(dataclasses.replace(GEOMETRY, patch_size=64, rotation=180, scale=scale))
    targets = [augment(image, mask, everything(mask), seed)[1] for seed in range(400)]
    empty = sum(bool((target == IGNORE).all()) for target in targets)
    assert 0 < empty < 120


def test_images_longer_than_opencv_can_address():
    image = np.zeros((3, 40000, 3), np.uint8)
    assert make_augmentation(FULL)(image, image[..., 0], np.ones((3, 40000), bool), 1)[0].shape == (32, 32, 3)


def test_ignored_stays_ignored_and_float_images_stay_in_range():
    image = RNG.random((50, 50, 3), dtype=np.float32)
    mask = np.full((50, 50), IGNORE, np.uint8)
    for seed in range(5):
        patch, target, _ = make_augmentation(FULL)(image, mask, everything(mask), seed)
        assert (target == IGNORE).all()
        assert patch.dtype == np.float32
        assert 0 <= patch.min() <= patch.max() <= 1


def test_light_changes_the_image_alone():
    image, mask = RNG.integers(50, 200, (60, 60, 3), dtype=np.uint8), blobs(60, 60)
    plain = make_augmentation(PLAIN)(image, mask, everything(mask), 3)
    for setting in ("brightness", "contrast", "gamma", "noise"):
        changed = make_augmentation(dataclasses.replace(PLAIN, **{setting: 0.2}))(image, mask, everything(mask), 3)
        assert (changed[0] != plain[0]).any(), setting
        np.testing.assert_array_equal(changed[1], plain[1])


def test_each_channel_gets_its_own_gain_and_offset_within_the_limits():
    image = np.full((60, 60, 3), 100, np.uint8)
    for dtype, scale in ((np.uint8, 1), (np.float32, 255)):
        augment = make_augmentation(dataclasses.replace(PLAIN, patch_size=1, brightness=0.1, contrast=0.2))
        values = np.array(
            [
                augment((image / scale).astype(dtype), image[..., 0], everything(image[..., 0]), n)[0][0, 0]
                for n in range(200)
            ]
        ) * float(scale)
        assert 80 - 26 <= values.min() < 70
        assert 130 < values.max() <= 120 + 26
        assert np.abs(np.corrcoef(values.T)[np.triu_indices(3, 1)]).max() < 0.3


def test_a_seed_fixes_everything_whatever_was_drawn_before():
    image, mask = RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8), blobs(60, 60)
    first, second = make_augmentation(FULL), make_augmentation(FULL)
    expected = first(image, mask, everything(mask), (1, 2, 3))
    second(image, mask, everything(mask), 9)
    np.random.seed(5)  # noqa: NPY002
    for one, other in zip(expected, second(image, mask, everything(mask), (1, 2, 3)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first(image, mask, everything(mask), (1, 2, 4))[0] != expected[0]).any()


def test_importing_and_building_says_nothing_and_asks_no_server():
    code = (
        "import socket; socket.socket.connect = None\n"
        "from unet_helpers.augmentation import make_augmentation; from unet_helpers.config import AugmentationConfig\n"
        "make_augmentation(AugmentationConfig(gamma=0.2, elastic=0.3))"
    )
    command = [sys.executable, "-W", "always", "-c", code]
    plain = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    assert "lbumentations" not in result.stdout + result.stderr
