import dataclasses
import os
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unet_helpers import datasets
from unet_helpers.catalogue import find_drive
from unet_helpers.config import IGNORE, AugmentationConfig, Config, DataConfig, ModelConfig, UserError
from unet_helpers.datasets import TrainingPatches, WholeImages, find_samples, load_sample, settle
from unet_helpers.images import field_of_view, normalise
from unet_helpers.sample_data import make_retina

REAL_DATA = os.environ.get("UNET_DATA_ROOT", "data")
RNG = np.random.default_rng(0)
SAMPLE = Config(
    seed=4,
    data=DataConfig(sample_images=(3, 2, 2), sample_size=64),
    augmentation=AugmentationConfig(patch_size=32, elastic=0.5),
)


def folder(root: Path, masks: dict[str, np.ndarray], size=(20, 30)) -> Config:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for name, mask in masks.items():
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}_mask.png")
    return Config(data=DataConfig("folder", str(root)), augmentation=AugmentationConfig(patch_size=16))


def masks_of(*values: int, count: int = 6) -> dict[str, np.ndarray]:
    return {f"p{n}": RNG.choice(np.array(values, np.uint8), (20, 30)) for n in range(count)}


def test_sample_data_is_what_the_generator_draws():
    samples = find_samples(SAMPLE.data)
    assert Counter(sample.split for sample in samples) == {"train": 3, "val": 2, "test": 2}
    image, mask = load_sample(samples[-1])
    np.testing.assert_array_equal(image, make_retina((2, 1), 64).image)
    np.testing.assert_array_equal(mask, make_retina((2, 1), 64).vessels)
    both = load_sample(find_samples(dataclasses.replace(SAMPLE.data, labels="artery_vein"))[0])[1]
    np.testing.assert_array_equal(both, make_retina((0, 0), 64).artery_vein)
    images = {load_sample(sample)[0].tobytes() for sample in samples}
    assert len(images) == 7  # no retina is in two splits


def test_folds_over_sample_data_validate_each_image_once():
    config = dataclasses.replace(SAMPLE.data, folds=5)
    found = [find_samples(dataclasses.replace(config, fold=fold)) for fold in range(5)]
    validating = [sample.name for samples in found for sample in samples if sample.split == "val"]
    assert sorted(validating) == ["train_000", "train_001", "train_002", "val_000", "val_001"]


def test_what_255_means_is_decided_for_the_data_set_and_not_for_the_file(tmp_path):
    config = folder(tmp_path / "binary", masks_of(0, 255))
    assert set(np.unique(load_sample(find_samples(config.data)[0])[1])) == {0, 1}
    masks = masks_of(0, 255) | {"q": np.array([[0, 1, 255]] * 20, np.uint8).repeat(10, axis=1)}
    samples = find_samples(folder(tmp_path / "classes", masks).data)
    assert {sample.meaning for sample in samples} == {"classes"}
    for sample in samples:
        assert IGNORE in load_sample(sample)[1]
    overruled = dataclasses.replace(config.data, root=str(tmp_path / "classes"), mask_values="binary")
    assert all(IGNORE not in load_sample(sample)[1] for sample in find_samples(overruled))


def test_the_split_depends_on_names_and_not_on_the_order_of_the_directory(tmp_path, monkeypatch):
    config = folder(tmp_path, masks_of(0, 1, count=10)).data
    expected = find_samples(config)
    iterdir, walk = Path.iterdir, os.walk
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(iterdir(self), reverse=True))
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((d, dirs[::-1], files[::-1]) for d, dirs, files in walk(*a, **k)))
    assert find_samples(config) == expected


def test_files_of_one_name_in_two_splits_have_two_names(tmp_path):
    for split in ("train", "test"):
        for kind, value in (("images", 99), ("masks", 1)):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / split / kind / f"{number}.png")
    samples = find_samples(DataConfig("folder", str(tmp_path)))
    assert len({sample.name for sample in samples}) == len(samples) == 6
    assert samples[-1].name == "test/2"


def test_copies_stay_with_their_original(tmp_path):
    masks = masks_of(0, 1, count=10)
    masks |= {f"{name}__{change}": mask for name, mask in masks.items() for change in ("hflip", "vflip")}
    samples = find_samples(folder(tmp_path, masks).data)
    assert Counter(sample.split for sample in samples) == {"train": 18, "val": 6, "test": 6}
    split_of = {sample.name: sample.split for sample in samples}
    assert all(split_of[name] == split_of[name.split("__")[0]] for name in split_of)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: (root / "masks/p0_mask.png").unlink(), "p0.png"),
        (lambda root: Image.new("L", (30, 21)).save(root / "masks/p0_mask.png"), r"p0_mask\.png.*30×21.*30×20"),
        (lambda root: Image.new("L", (30, 20), 17).save(root / "masks/p0_mask.png"), r"p0_mask\.png.*17"),
        (lambda root: (root / "images/p0.png").write_text("no picture"), "p0.png"),
        (lambda root: os.truncate(root / "masks/p0_mask.png", 60), "p0_mask.png"),
        (lambda root: (root / "images").rename(root / ".images"), "no image"),
    ],
)
def test_bad_data_ends_in_one_line_that_names_the_file(tmp_path, spoil, named):
    config = folder(tmp_path, masks_of(0, 1))
    spoil(tmp_path)
    with pytest.raises(UserError, match=named):
        [load_sample(sample) for sample in find_samples(config.data)]


def test_a_field_of_view_file_sets_255_and_nothing_else(tmp_path):
    config = folder(tmp_path / "data", masks_of(0, 255))
    view = np.zeros((20, 30), np.uint8)
    view[5:15] = 255
    Image.fromarray(view).save(tmp_path / "view.gif")
    bare = find_samples(config.data)[0]
    sample = dataclasses.replace(bare, field_of_view=str(tmp_path / "view.gif"))
    image, mask = load_sample(sample)
    np.testing.assert_array_equal(image, load_sample(bare)[0])
    np.testing.assert_array_equal(mask, np.where(view > 0, load_sample(bare)[1], IGNORE))
    np.testing.assert_array_equal(WholeImages([sample], config)[0][0], WholeImages([bare], config)[0][0])
    Image.fromarray(view[:-1]).save(tmp_path / "view.gif")
    with pytest.raises(UserError, match=r"view\.gif.*30×19"):
        load_sample(sample)


def test_missing_root_and_other_wrong_settings(tmp_path):
    for config in (DataConfig("folder", str(tmp_path / "nowhere")), DataConfig("drive", str(tmp_path / "nowhere"))):
        with pytest.raises(UserError, match="nowhere"):
            find_samples(config)
    with pytest.raises(UserError, match="observer"):
        find_samples(DataConfig(), observer=2)


def test_a_class_that_the_model_lacks_is_refused(tmp_path):
    config = folder(tmp_path, masks_of(0, 1, 2, 255))
    samples = find_samples(config.data)
    with pytest.raises(UserError, match="num_classes"):
        TrainingPatches(samples, config)
    with pytest.raises(UserError, match="num_classes"):
        WholeImages(samples, config)[0]
    TrainingPatches(samples, dataclasses.replace(config, model=ModelConfig(num_classes=3)))
    with pytest.raises(UserError, match="train on"):
        TrainingPatches([sample for sample in samples if sample.split == "test"], config)


def test_patches_are_tensors_the_network_takes():
    image, mask = TrainingPatches(find_samples(SAMPLE.data), SAMPLE)[0]
    assert (image.dtype, image.shape) == (torch.float32, (3, 32, 32))
    assert (mask.dtype, mask.shape) == (torch.int64, (32, 32))
    assert set(mask.unique().tolist()) <= {0, 1, IGNORE}
    assert torch.isfinite(image).all()


def test_every_epoch_shows_each_image_once_in_another_order_and_changed():
    patches = TrainingPatches(find_samples(SAMPLE.data), SAMPLE)
    orders = []
    for epoch in range(8):
        seeds: list[tuple] = []
        patches.augment = lambda *item, log=seeds: (log.append(item[3]), item[:3])[1]
        for place in range(len(patches)):
            patches[epoch * len(patches) + place]
        assert [seed[:2] for seed in seeds] == [(SAMPLE.seed, epoch)] * 3
        orders.append(tuple(seed[2] for seed in seeds))
        assert sorted(orders[-1]) == [1, 2, 3]
    assert len(set(orders)) > 1


def test_patches_are_bitwise_the_same_with_any_number_of_workers_and_from_any_start():
    samples = find_samples(SAMPLE.data)

    def draw(first: int, last: int, workers: int) -> list[torch.Tensor]:
        loader = DataLoader(TrainingPatches(samples, SAMPLE), 4, sampler=range(first, last), num_workers=workers)
        return [torch.cat([batch.flatten() for batch in batches]) for batches in zip(*loader, strict=True)]

    whole = draw(0, 16, 0)
    for one, other in zip(whole, draw(0, 16, 2), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole, draw(8, 16, 0), strict=True):
        assert torch.equal(one[len(one) // 2 :], other)
    other_seed = TrainingPatches(samples, dataclasses.replace(SAMPLE, seed=1))
    assert not torch.equal(other_seed[0][0], TrainingPatches(samples, SAMPLE)[0][0])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder data set that is too large for the memory; its configuration, and the cache folder."""
    config = folder(tmp_path / "set", masks_of(0, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return config, tmp_path / "cache" / "unet_helpers" / "folder-native"


@pytest.fixture
def decodings(monkeypatch) -> list[str]:
    """Names of the samples whose files are decoded, as it happens."""
    names, plain = [], datasets.load_sample
    monkeypatch.setattr(datasets, "load_sample", lambda sample: names.append(sample.name) or plain(sample))
    return names


def test_cached_masks_are_made_anew_where_their_values_mean_something_else(tmp_path, monkeypatch):
    config = folder(tmp_path / "set", masks_of(0, 255))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    for meaning, highest in (("binary", 1), ("classes", 255)):
        config.data.mask_values = meaning
        assert datasets.Decoded(find_samples(config.data), config)[0][1].max() == highest


def test_large_sets_are_decoded_once_and_come_from_mapped_files(cached, decodings, monkeypatch, capsys):
    config, cache = cached
    samples = find_samples(config.data)
    expected = [TrainingPatches(samples, config)[n] for n in range(4)]
    assert not cache.exists()
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    TrainingPatches(samples, config, quiet=True)
    assert capsys.readouterr().err == ""
    assert len(list(cache.iterdir())) == 4
    decodings.clear()
    patches = TrainingPatches(samples, config)
    assert "reading images" in capsys.readouterr().err
    assert decodings == []
    assert isinstance(patches.decoded[1][0], np.memmap)
    for one, other in zip(expected, [pickle.loads(pickle.dumps(patches))[n] for n in range(4)], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert decodings == []


def test_the_cache_does_not_care_how_a_path_is_written(cached, decodings, monkeypatch, tmp_path):
    config, _ = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    TrainingPatches(find_samples(config.data), config)
    decodings.clear()
    monkeypatch.chdir(tmp_path)
    config.data.root = os.path.relpath(config.data.root)
    assert not os.path.isabs(find_samples(config.data)[0].image)
    TrainingPatches(find_samples(config.data), config)
    assert decodings == []


def test_large_sets_are_decoded_once_even_if_little_is_kept_of_them(cached, decodings, monkeypatch):
    config, cache = cached
    config.data.longest_side = 15
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)  # 2,400 bytes an image, 750 when reduced
    samples = find_samples(config.data)
    TrainingPatches(samples, config)
    decodings.clear()
    TrainingPatches(samples, config)
    assert decodings == []
    assert len(list(cache.with_name("folder-15").iterdir())) == 4


def test_a_set_whose_first_image_is_small_is_cached_all_the_same(cached, monkeypatch):
    config, cache = cached
    samples = find_samples(config.data)
    first = next(sample for sample in samples if sample.split == "train")
    for path in (first.image, first.mask):
        Image.open(path).crop((0, 0, 16, 16)).save(path)
    config.augmentation.patch_size = 16
    sizes = [sum(part.nbytes for part in datasets.decode(one, config)) for one in samples if one.split == "train"]
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", len(sizes) * (sizes[0] + 1))
    patches = TrainingPatches(samples, config, quiet=True)
    assert max(sizes) > sizes[0]
    assert patches.decoded.cached
    assert len(list(cache.iterdir())) == len(sizes) - 1


def test_the_cache_is_renewed_where_a_source_has_changed_or_a_file_is_damaged(cached, decodings, monkeypatch):
    config, cache = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    samples = find_samples(config.data)[:4]
    TrainingPatches(samples, config)
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(samples[1].image)  # another size in bytes
    mask = np.array(Image.open(samples[2].mask))
    os.utime(samples[2].mask, ns=(1, 1))  # another time
    decodings.clear()
    patches = TrainingPatches(samples, config)
    assert decodings == [samples[1].name, samples[2].name]
    assert (patches.decoded[1][0] == 77).all()
    np.testing.assert_array_equal(patches.decoded[2][1], mask)
    for path, damage in zip(sorted(cache.iterdir()), (b"", b"\xff" * 99, path_content(cache)[:-7]), strict=False):
        path.write_bytes(damage)
    decodings.clear()
    again = TrainingPatches(samples, config)
    assert len(decodings) in (3, 4)  # the first one is also asked for its size
    for one, other in zip(patches.decoded, again.decoded, strict=False):
        np.testing.assert_array_equal(one[0], other[0])
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]  # no half-written file stays


def test_the_cache_is_renewed_where_the_program_reads_pictures_otherwise(cached, decodings, monkeypatch):
    config, _ = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    samples = find_samples(config.data)
    TrainingPatches(samples, config)
    decodings.clear()
    monkeypatch.setattr(datasets, "VERSION", datasets.VERSION + 1)
    TrainingPatches(samples, config)
    assert len(decodings) >= 4


def test_a_class_that_is_lost_when_a_mask_is_reduced_is_refused_by_name_before_the_first_epoch(tmp_path):
    masks = masks_of(0, 1)
    config = folder(tmp_path / "set", masks)
    config.data.longest_side, config.data.mask_values = 32, "classes"
    samples = find_samples(config.data)
    found = next(sample for sample in samples if sample.split == "val")
    mask = np.zeros((200, 200), np.uint8)
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(found.image)
    mask[0, 0], mask[100:, 100:] = 7, 1  # one pixel, which is gone at 32 × 32
    Image.fromarray(mask).save(found.mask)
    assert 7 not in datasets.images.shrink(mask, 32, is_mask=True)
    with pytest.raises(UserError, match=rf"{re.escape(found.mask)} holds the value 7.*num_classes"):
        WholeImages([found], config, native=False)[0]
    monkey = WholeImages([found], config)
    monkey.decoded.kept[0] = datasets.decode(found, replace(config, model=replace(config.model, num_classes=8)))
    with pytest.raises(UserError, match=rf"{re.escape(found.mask)} holds the value 7"):  # as a cache made for 8 classes
        monkey[0]


def test_another_split_or_group_leaves_the_cache_valid(cached, decodings, monkeypatch):
    config, _ = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    samples = find_samples(config.data)
    before = [datasets.Decoded(samples, config)[n] for n in range(len(samples))]
    decodings.clear()
    moved = [dataclasses.replace(sample, split="test", group="other") for sample in samples]
    for n, item in enumerate(before):
        np.testing.assert_array_equal(datasets.Decoded(moved, config)[n][0], item[0])
    assert decodings == []


def path_content(cache: Path) -> bytes:
    return sorted(cache.iterdir())[2].read_bytes()


def test_an_interrupted_cache_is_completed(cached, decodings, monkeypatch):
    config, cache = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    samples = find_samples(config.data)
    plain = datasets.write_whole

    def fail_after_two(path, content):
        if len(list(cache.iterdir())) == 2:
            raise KeyboardInterrupt
        plain(path, content)

    monkeypatch.setattr(datasets, "write_whole", fail_after_two)
    with pytest.raises(KeyboardInterrupt):
        TrainingPatches(samples, config)
    monkeypatch.setattr(datasets, "write_whole", plain)
    decodings.clear()
    assert len(TrainingPatches(samples, config)) == 4
    assert len(decodings) == 2


def test_images_are_reduced_for_the_network_and_masks_stay_native_for_scoring(tmp_path, cached, decodings):
    config, _ = cached
    config.data.longest_side = 15
    samples = find_samples(config.data)
    image, mask = load_sample(samples[0])
    small, reduced, _ = WholeImages(samples, config, native=False)[0]
    assert (tuple(small.shape), tuple(reduced.shape)) == ((3, 10, 15), (10, 15))
    means = image.astype(float).reshape(10, 2, 15, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    expected = (means - means.mean((1, 2), keepdims=True)) / means.std((1, 2), keepdims=True)
    np.testing.assert_allclose(small, expected, atol=0.02)  # means are rounded to whole numbers first
    assert all(reduced[y, x] in mask[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] for y in range(10) for x in range(15))
    same, native, _ = WholeImages(samples, config)[0]
    assert torch.equal(small, same)
    np.testing.assert_array_equal(native, mask)
    patches = TrainingPatches(samples, config)
    assert patches.decoded[0][0].shape == (10, 15, 3)


def test_a_limit_takes_some_training_images_and_a_smaller_one_some_of_those():
    def names(limit: int | None, seed: int = 0) -> list[str]:
        data = dataclasses.replace(SAMPLE.data, sample_images=(9, 2, 2), train_limit=limit)
        config = dataclasses.replace(SAMPLE, data=data, seed=seed)
        return TrainingPatches(find_samples(data), config).names

    assert [len(names(limit)) for limit in (1, 4, 9, 20, None)] == [1, 4, 9, 9, 9]
    assert set(names(2)) < set(names(5)) < set(names(None))
    assert len({tuple(names(3, seed)) for seed in range(5)}) > 1


def test_the_network_gets_the_normalisation_that_is_set():
    config = dataclasses.replace(SAMPLE, data=dataclasses.replace(SAMPLE.data, normalisation="imagenet"))
    sample = find_samples(config.data)[0]
    expected = normalise(load_sample(sample)[0], kind="imagenet").transpose(2, 0, 1)
    np.testing.assert_array_equal(WholeImages([sample], config)[0][0], expected)
    plain = AugmentationConfig(64, False, 0, (1, 1), 0, 0, 0, 0, 0)  # all of the image, as it is
    patch = TrainingPatches([sample], dataclasses.replace(config, augmentation=plain))[0][0]
    np.testing.assert_array_equal(patch, expected)


def test_patches_are_normalised_inside_the_field_of_view_of_the_whole_image():
    plain = AugmentationConfig(64, False, 0, (1, 1), 0, 0, 0, 0, 0)
    config = dataclasses.replace(SAMPLE, augmentation=plain)
    image = load_sample(find_samples(SAMPLE.data)[0])[0]
    whole = normalise(image, view := field_of_view(image))
    assert 0.5 < view.mean() < 0.9
    known = {value.tobytes() for value in whole.reshape(-1, 3)} | {np.zeros(3, np.float32).tobytes()}
    patches = TrainingPatches(find_samples(SAMPLE.data)[:1], config)
    patch = np.ascontiguousarray(patches[0][0].numpy().transpose(1, 2, 0))
    assert {value.tobytes() for value in patch.reshape(-1, 3)} <= known
    inside = WholeImages(find_samples(SAMPLE.data)[:1], config)[0][0].numpy()[:, view]
    np.testing.assert_allclose(inside.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(inside.std(axis=1), 1, atol=1e-4)


def test_whole_images_keep_their_size_and_name(tmp_path):
    config = folder(tmp_path, masks_of(0, 1))
    samples = find_samples(config.data)
    images = WholeImages(samples, config)
    for _ in range(2):  # decoded, then kept
        for sample, (image, mask, name) in zip(samples, images, strict=True):
            assert (name, tuple(image.shape), tuple(mask.shape)) == (sample.name, (3, 20, 30), (20, 30))
            np.testing.assert_array_equal(mask, load_sample(sample)[1])


@pytest.mark.skipif(not find_drive(REAL_DATA), reason="no DRIVE in data/ or the folder that UNET_DATA_ROOT names")
def test_real_drive_and_its_second_observer():
    config = DataConfig("drive", REAL_DATA)
    samples = find_samples(config)
    assert Counter(sample.split for sample in samples) == {"train": 16, "val": 4, "test": 20}
    first = [sample for sample in samples if sample.split == "test"]
    both = agreed = 0
    for one, other in zip(first, find_samples(config, observer=2), strict=True):
        assert one.image == other.image
        truth, second = load_sample(one)[1], load_sample(other)[1]
        np.testing.assert_array_equal(truth == IGNORE, second == IGNORE)
        both += (truth == 1).sum() + (second == 1).sum()
        agreed += ((truth == 1) & (second == 1)).sum()
    assert 2 * agreed / both == pytest.approx(0.789, abs=5e-4)


def test_masks_of_two_conventions_are_asked_about(tmp_path):
    masks = {f"a{n}": np.array([[0, 1]], np.uint8) for n in range(3)}
    masks |= {f"b{n}": np.array([[0, 255]], np.uint8) for n in range(3)}
    with pytest.raises(UserError, match=r"b0.*data\.mask_values"):
        find_samples(folder(tmp_path, masks).data)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_without_any_foreground_are_refused_before_training(tmp_path, value):
    config = folder(tmp_path, {f"a{n}": np.full((20, 30), value, np.uint8) for n in range(5)})
    config.data.mask_values = "classes"
    with pytest.raises(UserError, match="no foreground"):
        TrainingPatches(find_samples(config.data), config)


def test_a_cached_file_that_holds_something_else_is_made_anew(cached, monkeypatch):
    config, cache = cached
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 5_000)
    samples = find_samples(config.data)
    expected = [item[0].copy() for item in TrainingPatches(samples, config).decoded]
    for path in cache.iterdir():
        np.save(path, np.zeros(7))
    again = TrainingPatches(samples, config).decoded
    assert all((one == other[0]).all() for one, other in zip(expected, again, strict=True))


# ---- masks in colours

PAINT = np.array([(0, 0, 0), (0, 0, 255), (0, 200, 0)], np.uint8)  # in the order of their values


def test_one_mask_in_colours_makes_all_of_them_colours(tmp_path):
    masks = masks_of(0, 1, 2, count=5)
    config = folder(tmp_path, {name: PAINT[mask] for name, mask in masks.items()} | {"q": np.zeros((20, 30), np.uint8)})
    for sample in find_samples(config.data):
        np.testing.assert_array_equal(load_sample(sample)[1], 0 if sample.name == "q" else masks[sample.name])
    settled = settle(config.data)
    assert (settled.mask_values, settled.palette) == ("colours", ("#000000", "#0000ff", "#00c800"))
    assert settle(settled) == settled


def test_indices_count_unless_palettes_disagree(tmp_path):
    masks = masks_of(0, 1, 2, count=6)
    config = folder(tmp_path, masks)

    def paint(name: str, order: list[int]) -> None:
        picture = Image.fromarray(np.argsort(order).astype(np.uint8)[masks[name]])
        picture.putpalette(PAINT[order].tobytes())
        picture.save(tmp_path / "masks" / f"{name}_mask.png")

    for name in masks:
        paint(name, [0, 1, 2])
    assert find_samples(config.data)[0].meaning == "classes"
    paint("p5", [0, 2, 1])  # as programs that number the colours of each file by themselves do
    for sample in find_samples(config.data):
        picture = np.array(Image.open(sample.mask).convert("RGB"))
        np.testing.assert_array_equal(PAINT[load_sample(sample)[1]], picture)


def test_a_run_remembers_the_palette_and_other_masks_are_not_numbered_anew(tmp_path):
    config = folder(tmp_path / "all", {name: PAINT[mask] for name, mask in masks_of(0, 1, 2).items()})
    settled = settle(config.data)
    fewer = folder(tmp_path / "fewer", {f"p{n}": PAINT[2 * np.eye(20, 30, dtype=np.uint8)] for n in range(5)})
    alone = load_sample(find_samples(fewer.data)[0])[1]
    known = load_sample(find_samples(dataclasses.replace(settled, root=fewer.data.root))[0])[1]
    assert (set(np.unique(alone)), set(np.unique(known))) == ({0, 1}, {0, 2})
    stray = folder(tmp_path / "stray", {f"p{n}": np.full((20, 30, 3), (1, 2, 3), np.uint8) for n in range(5)})
    with pytest.raises(UserError, match=r"p\d_mask\.png.*#010203"):
        load_sample(find_samples(dataclasses.replace(settled, root=stray.data.root))[0])
    plain = folder(tmp_path / "plain", masks_of(0, 1, 2, 255))
    assert settle(plain.data).mask_values == "classes"
    assert settle(plain.data).palette is None
    assert settle(SAMPLE.data) == SAMPLE.data


def test_a_mask_in_another_orientation_than_its_image_says_so(tmp_path):
    config = folder(tmp_path, masks_of(0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    for sample in find_samples(config.data):
        if sample.name == "p0":
            image, mask = (Image.open(path).copy() for path in (sample.image, sample.mask))
            image.save(sample.image, exif=exif)
            with pytest.raises(UserError, match=r"p0_mask\.png.*30×20.*20×30.*EXIF"):
                load_sample(sample)
            mask.save(sample.mask, exif=exif)
            both = load_sample(sample)
            np.testing.assert_array_equal(both[0], np.rot90(np.array(image), -1))
            np.testing.assert_array_equal(both[1], np.rot90(np.array(mask), -1))
