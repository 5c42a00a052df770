"""Samples: which image belongs to which mask and to which split, and how they reach the network.

`find_samples` lists a data set, `load_sample` reads one image with its mask, and two datasets feed the network:
`TrainingPatches`, an endless stream of augmented patches, and `WholeImages`, untouched and at native size.
"""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from unet_helpers import images
from unet_helpers.augmentation import make_augmentation
from unet_helpers.config import IGNORE, Config, DataConfig, UserError
from unet_helpers.pairing import SPLITS, assign_splits, groups_by_name, read_drive, read_folder
from unet_helpers.sample_data import make_retina

MEMORY_LIMIT = 2_000_000_000  # bytes of decoded training images kept in memory, and a quarter for whole images


@dataclass(frozen=True)
class Sample:
    """One image with its mask."""

    name: str  # short and readable, unique within a split
    image: str  # path of the photograph; for the sample data `sample:LABELS:SIZE:SPLIT:NUMBER`, drawn when loaded
    mask: str  # path of the mask, or the same
    field_of_view: str | None  # path of a picture that is 0 outside the field of view
    group: str  # what must stay on one side of a split
    split: str  # `train`, `val` or `test`
    meaning: images.Meaning = "binary"  # of the values in the mask file, see `images.mask_meaning`


def find_samples(config: DataConfig, observer: int = 1) -> list[Sample]:
    """List the samples of a data set with their splits, sorted by split and name.

    Args:
        config: which data set, and how it is split.
        observer: for DRIVE, 2 gives the test images with the second observer's masks, and nothing else.

    Raises:
        UserError: naming the folder or file, if anything is missing, ambiguous or cannot be split.
    """
    if observer != 1 and (config.name != "drive" or observer != 2):
        raise UserError(f"data.name={config.name} has no observer {observer}: only `drive` has a second one")
    if config.name == "sample":
        counts = zip(SPLITS, config.sample_images, strict=True)
        brought = [(split, f"{split}_{index:03d}") for split, count in counts for index in range(count)]
        splits = assign_splits([name for _, name in brought], [split for split, _ in brought], config)
        meaning, samples = "binary" if config.labels == "vessels" else "classes", []
        for (_, name), split in zip(brought, splits, strict=True):
            key = f"sample:{config.labels}:{config.sample_size}:{name.replace('_', ':')}"
            samples.append(Sample(name, key, key, None, name, split, meaning))
    else:
        root = Path(config.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{root}: no such folder: set data.root to the folder that holds the data")
        if config.name == "drive":
            pairs, meaning = read_drive(root, observer), "binary"
            groups = [pair.image.stem for pair in pairs]
        else:
            pairs, meaning = read_folder(root), config.mask_values
            groups = groups_by_name(pairs, config.group_pattern)
            if meaning == "auto":
                meaning = _meaning_of([pair.mask for pair in pairs])
        brought = [pair.split for pair in pairs]
        splits = brought if observer == 2 else assign_splits(groups, brought, config)
        samples = []
        for pair, group, split in zip(pairs, groups, splits, strict=True):
            name, view = "/".join([*pair.folders, pair.image.stem]), pair.field_of_view and str(pair.field_of_view)
            samples.append(Sample(name, str(pair.image), str(pair.mask), view, group, split, meaning))
    return sorted(samples, key=lambda sample: (SPLITS.index(sample.split), sample.name))


def _meaning_of(masks: Sequence[Path]) -> images.Meaning:
    """What mask values mean, from every mask of the data set; an error names the mask with the strangest ones."""
    values = {path: set(np.flatnonzero(np.bincount(images.read_mask_values(path).ravel())).tolist()) for path in masks}
    found = set().union(*values.values())
    if found == {0, 1, IGNORE} and not any({1, IGNORE} <= held for held in values.values()):
        odd = next(path for path in masks if IGNORE in values[path])
        raise UserError(f"{odd}: holds 0 and 255 where others hold 0 and 1: is 255 foreground? set data.mask_values")
    try:
        return images.mask_meaning(found)
    except UserError as error:
        strangest = max(values, key=lambda path: len(values[path] - {0, 1, IGNORE}))
        raise UserError(f"{strangest}: {error}") from error


def load_sample(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask.

    Returns:
        image: uint8 (H, W, 3), or float32 (H, W, 3) in 0..1 if the file has more than 8 bits.
        mask: uint8 (H, W), class indices; 255 where the mask, or the field of view's file, says "ignore".
    """
    if sample.image.startswith("sample:"):
        _, labels, size, split, index = sample.image.split(":")
        retina = make_retina((SPLITS.index(split), int(index)), int(size))
        return retina.image, getattr(retina, labels)
    image, values = images.read_image(sample.image), images.read_mask_values(sample.mask)
    _check_size(sample.mask, values, sample.image, image)
    try:
        mask = images.decode_mask(values, sample.meaning)
    except UserError as error:
        raise UserError(f"{sample.mask}: {error}") from error
    if sample.field_of_view is not None:
        view = images.read_mask_values(sample.field_of_view)
        _check_size(sample.field_of_view, view, sample.image, image)
        mask[view == 0] = IGNORE
    return image, mask


def _check_size(path: str, mask: np.ndarray, image_path: str, image: np.ndarray) -> None:
    if mask.shape != image.shape[:2]:
        sizes = ["×".join(map(str, array.shape[1::-1])) for array in (mask, image)]
        raise UserError(f"{path}: has {sizes[0]} pixels, but its image {image_path} {sizes[1]}: make them of one size")


class TrainingPatches(Dataset):
    """An endless stream of augmented patches; item n is the n-th image that training sees.

    With N images, item n belongs to epoch n // N and is the image at place n % N of that epoch's own shuffling. A patch
    depends on (seed, epoch, index of the image) alone, so neither the number of loader workers nor an interruption
    changes it: `DataLoader(patches, sampler=range(first, last))` goes on wherever training stopped. `len` is N.

    Items are (image, mask): float32 (3, P, P), normalised by the whole image's statistics inside its field of view and
    0 outside; int64 (P, P) with 255 for "ignore". All images are decoded at once, and memory-mapped beyond
    `MEMORY_LIMIT`. Raises `UserError` if no sample is for training, or a mask holds a class that `config.model` lacks.
    """

    def __init__(self, samples: Sequence[Sample], config: Config) -> None:
        samples = [sample for sample in samples if sample.split == "train"]
        if not samples:
            raise UserError("there is no image to train on: check data.root and the shares of the splits")
        self.names = [sample.name for sample in samples]
        self.seed, self.augment = config.seed, make_augmentation(config.augmentation)
        self.decoded, used, there = [], 0, False
        for sample in samples:
            arrays, statistics = _decode(sample, config.model.num_classes)
            there |= bool(((arrays[1] != 0) & (arrays[1] != IGNORE)).any())
            used += sum(array.nbytes for array in arrays)
            self.decoded.append((arrays if used <= MEMORY_LIMIT else _to_files(arrays), statistics))
        if not there:
            raise UserError(f"{samples[0].mask}: this and all other training masks hold no foreground: check the masks")

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(number, len(self))
        # To NumPy the seeds (s, e) and (s, e, 0) are the same, so the shuffling takes 0 and the images count from 1.
        index = int(np.random.default_rng((self.seed, epoch, 0)).permutation(len(self))[place])
        arrays, statistics = self.decoded[index]
        # Mapped, of image and mask only what the patch covers is read.
        arrays = [np.load(array, mmap_mode="r") if isinstance(array, str) else array for array in arrays]
        image, mask, view = self.augment(*arrays, (self.seed, epoch, 1 + index))
        return _to_tensors(image, mask, view, statistics)


class WholeImages(Dataset):
    """Images as they are, for validation and testing; items are (image, mask, name).

    float32 (3, H, W), normalised inside the field of view and 0 outside; int64 (H, W) with 255 for "ignore"; the
    sample's name. Sizes may differ, so take them one at a time. Raises `UserError` as `TrainingPatches` does.
    """

    def __init__(self, samples: Sequence[Sample], config: Config) -> None:
        self.samples, self.num_classes = list(samples), config.model.num_classes
        self.kept: dict[int, tuple] = {}
        self.room = MEMORY_LIMIT // 4

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        if number not in range(len(self)):
            raise IndexError(number)  # ends a plain `for` loop
        arrays, statistics = self.kept.get(number) or _decode(self.samples[number], self.num_classes)
        size = sum(array.nbytes for array in arrays)
        if number not in self.kept and size <= self.room:
            self.kept[number], self.room = (arrays, statistics), self.room - size
        return *_to_tensors(*arrays, statistics), self.samples[number].name


def _decode(sample: Sample, num_classes: int) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Image, mask and estimated field of view; and the image's mean and deviation inside it."""
    image, mask = load_sample(sample)
    highest = int(mask[mask != IGNORE].max(initial=0))
    if highest >= max(2, num_classes):
        raise UserError(f"{sample.mask}: holds class {highest}, so model.num_classes must exceed {highest}")
    view = images.field_of_view(image)
    return [image, mask, view], images.statistics_inside(image, view)


def _to_files(arrays: Sequence[np.ndarray]) -> list[str]:
    """Write arrays to files that vanish with this process; paths, so that a worker process can map them itself."""
    folder = tempfile.mkdtemp(prefix="unet_helpers_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = [f"{folder}/{number}.npy" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return paths


def _to_tensors(image: np.ndarray, mask: np.ndarray, view: np.ndarray, statistics) -> tuple[torch.Tensor, torch.Tensor]:
    normalised = images.normalise(image, view, statistics).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(normalised)), torch.from_numpy(mask.astype(np.int64))
