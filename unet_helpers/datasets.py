"""Samples: which image belongs to which mask and to which split, and how they reach the network."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from unet_helpers import augmentation, catalogue, images, sample_data
from unet_helpers.config import IGNORE, Config, DataConfig, UserError
from unet_helpers.losses import check_labels
from unet_helpers.pairing import SPLITS, assign_splits, groups_by_name, read_folder
from unet_helpers.system import make_folder, write_whole

MEMORY_LIMIT = 200_000_000  # bytes of decoded images that one data set may have; larger ones are cached on disk
draw_once = lru_cache(maxsize=64)(sample_data.make_retina)  # data sets of several runs ask for the same drawings
PARTS = ("image", "mask", "view", "mean", "deviation")  # of a decoded image
VERSION = 2  # of what `decode` makes of a file; another number makes caches anew


@dataclass(frozen=True)
class Sample:
    """One image with its mask."""

    name: str  # short and readable, unique within a split
    image: str  # path of the photograph; for the sample data `sample:LABELS:SIZE:SPLIT:NUMBER`, drawn when loaded
    mask: str  # path of the mask, or the same
    field_of_view: str | None  # path of a picture that is 0 outside the field of view
    group: str  # what must stay on one side of a split
    split: str  # `train`, `val` or `test`
    meaning: images.Meaning = "binary"  # of the values in the mask file, see `images.decode_mask`
    number: int | None = None  # of the image within a file of many


def find_samples(config: DataConfig, observer: int = 1) -> list[Sample]:
    """List the samples of a data set, sorted by split and name; with DRIVE's `observer` 2 only the test images.

    Raises `UserError`, naming the folder or file, if anything is missing, ambiguous or cannot be split.
    """
    if observer != 1 and (config.name != "drive" or observer != 2):
        raise UserError(f"data.name={config.name} has no observer {observer}: only `drive` has a second one")
    samples = []
    if config.name == "sample":
        counts = zip(SPLITS, config.sample_images, strict=True)
        names = [f"{split}_{index:03d}" for split, count in counts for index in range(count)]
        splits = assign_splits(names, [name.split("_")[0] for name in names], config)
        meaning = "binary" if config.labels == "vessels" else "classes"
        for name, split in zip(names, splits, strict=True):
            key = f"sample:{config.labels}:{config.sample_size}:{name.replace('_', ':')}"
            samples.append(Sample(name, key, key, None, name, split, meaning))
    else:
        root = Path(os.path.expanduser(config.root))
        if not (root.is_dir() or (config.name == "folder" and root.is_file())):
            raise UserError(f"{root}: no such folder: set data.root to the folder that holds the data")
        if config.name == "folder":
            pairs = read_folder(root)
            groups = groups_by_name(pairs, config.group_pattern)
            meaning = find_meaning([pair.mask for pair in pairs], wanted_meaning(config))
        else:
            pairs, groups, meaning = catalogue.read_public(config.name, root, observer)
        brought = [pair.split for pair in pairs]
        if config.name == "camvid" and config.folds:
            raise UserError(f"data.folds is {config.folds}, but camvid has a standard split: set it to 0")
        # CamVid's standard split has frames of one film on two sides; whoever compares with others must follow it.
        splits = brought if observer == 2 or config.name == "camvid" else assign_splits(groups, brought, config)
        for pair, group, split in zip(pairs, groups, splits, strict=True):
            stem = pair.image.stem if pair.number is None else f"{pair.number:04d}"
            name, view = "/".join([*pair.folders, stem]), pair.field_of_view and str(pair.field_of_view)
            samples.append(Sample(name, str(pair.image), str(pair.mask), view, group, split, meaning, pair.number))
    return sorted(samples, key=lambda sample: (SPLITS.index(sample.split), sample.name))


def wanted_meaning(config: DataConfig) -> images.Meaning | str:
    """What the settings say of the masks of a folder: `auto`, `binary`, `classes`, `colours`, or the class of each."""
    if config.palette:
        return images.Colours({int(colour[1:], 16): index for index, colour in enumerate(config.palette)})
    return config.mask_values


def settle(config: DataConfig) -> DataConfig:
    """The settings with what `auto` finds in a folder's masks, lest a run take others to mean something else."""
    if config.name != "folder":
        return config
    meaning = find_samples(config)[0].meaning
    palette = tuple(f"#{colour:06x}" for colour in meaning) if isinstance(meaning, images.Colours) else None
    return replace(config, mask_values="colours" if palette else meaning, palette=palette)


def find_meaning(masks: Sequence[Path], wanted: images.Meaning | str = "auto") -> images.Meaning:
    """What mask values mean: what is `wanted` or, for `auto` and `colours`, what every mask of the data set says.

    They are `colours` if any is in true colours, or palettes disagree. An error names the mask of strangest values.
    """
    if wanted != "auto":
        return images.find_palette(masks) if wanted == "colours" else wanted
    values, colour_of = {}, {}
    for path in tqdm(masks, "reading masks", unit="mask", leave=False, disable=None):
        try:
            values[path], palette = images.survey_mask(path)
        except images.InColours:
            return images.find_palette(masks)
        if any(colour_of.setdefault(*item) != item[1] for item in palette.items()):
            return images.find_palette(masks)
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
    """Read an image as `read_image` does and its mask, uint8 (H, W), class indices; 255: ignore, or not in the view."""
    if sample.image.startswith("sample:"):
        _, labels, size, split, index = sample.image.split(":")
        retina = draw_once((SPLITS.index(split), int(index)), int(size))
        return retina.image.copy(), getattr(retina, labels).copy()
    if sample.number is not None:
        image, values = catalogue.load_nyuv2(sample.image, sample.number)
    else:
        image = images.read_image(sample.image)
        values = images.read_mask_values(sample.mask, isinstance(sample.meaning, images.Colours))
    view = None if sample.field_of_view is None else images.read_mask_values(sample.field_of_view)
    for path, array in ((sample.mask, values), (sample.field_of_view, view)):
        if array is not None and array.shape != image.shape[:2]:
            sizes = ["×".join(map(str, one.shape[1::-1])) for one in (array, image)]
            problem = f"has {sizes[0]} pixels, but its image {sample.image} {sizes[1]}"
            if sample.number is None and images.orientation(path) != images.orientation(sample.image):
                problem += ", after one of them was turned as its EXIF data say"
            raise UserError(f"{path}: {problem}: make them of one size")
    mask = images.decode_mask(values, sample.meaning, sample.mask)
    if view is not None:
        mask[view == 0] = IGNORE
    return image, mask


def decode(sample: Sample, config: Config) -> tuple[np.ndarray, ...]:
    """Image and mask of `load_sample`, reduced; the estimated field of view, bool (H, W); mean and deviation inside."""
    image, mask = load_sample(sample)
    check_labels(mask, config.model.num_classes, sample.mask)  # now: what is rare may vanish when it is reduced
    image, mask = images.shrink(image, config.data.longest_side), images.shrink(mask, config.data.longest_side, True)
    view = images.field_of_view(image)
    return image, mask, view, *images.statistics_inside(image, view)


class Decoded:
    """What `decode` gives of each sample of a data set, computed only once.

    Sets of more than `MEMORY_LIMIT` bytes at full size, even if they are reduced, are cached in `$XDG_CACHE_HOME`, by
    default `~/.cache`: one memory-mapped NPY file an image, which can be deleted at any time. It remembers size and
    time of its sources, so what is missing or outdated is made anew.
    """

    def __init__(self, samples: Sequence[Sample], config: Config) -> None:
        self.samples, self.config, self.kept, self.cached = list(samples), config, {}, False
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "unet_helpers"
        self.folder = cache / f"{config.data.name}-{config.data.longest_side or 'native'}"
        if self.samples and not self.samples[0].image.startswith("sample:"):
            known = _read_cached(*self._cache_file(0)) is not None
            self.cached = known or len(self) * sum(part.nbytes for part in load_sample(self.samples[0])) > MEMORY_LIMIT

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        if index in self.kept:
            return self.kept[index]
        path, source = self._cache_file(index)
        item = _read_cached(path, source) if self.cached else None
        if item is None:
            item = decode(self.samples[index], self.config)
            large = len(self) * sum(array.nbytes for array in item) > MEMORY_LIMIT
            self.cached |= large and self.config.data.name != "sample"
            if self.cached:
                make_folder(self.folder)
                parts, buffer = {**dict(zip(PARTS, item, strict=True)), "source": np.array(source)}, io.BytesIO()
                record = np.dtype([(name, part.dtype, part.shape) for name, part in parts.items()], align=True)
                np.save(buffer, np.array(tuple(parts.values()), record))
                write_whole(path, buffer.getvalue())
        if not self.cached:
            self.kept[index] = item
        return item

    def _cache_file(self, index: int) -> tuple[Path, str]:
        """The cached file of an image, and what it remembers: this changes when the image's own files do."""
        sample = self.samples[index]
        files = [path for path in (sample.image, sample.mask, sample.field_of_view) if path and os.path.exists(path)]
        states = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
        place = os.path.abspath(sample.image), os.path.abspath(sample.mask), sample.number
        view = sample.field_of_view and os.path.abspath(sample.field_of_view)
        meant = states, view, sample.meaning, VERSION  # of all that changes the cached image; not how a path is written
        name, source = (hashlib.sha256(repr(what).encode()).hexdigest() for what in (place, meant))
        return self.folder / f"{name}.npy", source

    def check(self, index: int) -> tuple[np.ndarray, ...]:
        """The item, whose mask must hold no class that `config.model` lacks, or `UserError` names the file."""
        item = self[index]
        check_labels(item[1], self.config.model.num_classes, self.samples[index].mask)
        return item


def _read_cached(path: Path, source: str) -> tuple[np.ndarray, ...] | None:
    """Memory-mapped arrays of a cached image, None if there is none, or it is outdated or damaged."""
    try:
        record = np.lib.format.open_memmap(path, mode="r")
        item = tuple(record[name] for name in PARTS)
        fits = item[0].shape == (*item[1].shape, 3) and item[1].shape == item[2].shape
        fits = fits and "".join(part.dtype.kind for part in item) in ("uubff", "fubff")
        return item if fits and record["source"] == source else None
    except (*images.DAMAGE, MemoryError, TokenError):  # NumPy reads a header as Python's literals
        return None


class TrainingPatches(Dataset):
    """An endless stream of augmented patches; item n is the n-th that training sees, `len` the number N of images.

    It is from the image at place n % N of epoch n // N's shuffling and depends on (seed, epoch, index of the image)
    alone: any number of loader workers gives the same, and `sampler=range(first, last)` goes on where training stopped.
    Items are (image, mask): float32 (3, P, P), normalised as the whole image is and 0 outside its field of view; int64
    (P, P) with 255 for "ignore". `UserError` if no sample is for training or no mask holds foreground, and as `check`.
    """

    def __init__(self, samples: Sequence[Sample], config: Config, quiet: bool = False) -> None:
        samples = [sample for sample in samples if sample.split == "train"]
        if not samples:
            raise UserError("there is no image to train on: check data.root and the shares of the splits")
        if config.data.train_limit:  # a smaller limit takes some of those that a larger one takes
            drawn = np.random.default_rng(config.seed).permutation(len(samples))[: config.data.train_limit]
            samples = [samples[index] for index in sorted(drawn)]
        self.names, self.kind = [sample.name for sample in samples], config.data.normalisation
        self.seed, self.augment = config.seed, augmentation.make_augmentation(config.augmentation)
        self.decoded, there = Decoded(samples, config), False
        for index in tqdm(range(len(samples)), "reading images", leave=False, disable=quiet or not self.decoded.cached):
            mask = self.decoded.check(index)[1]
            there = there or bool(((mask != 0) & (mask != IGNORE)).any())
        if not there:
            raise UserError(f"{samples[0].mask}: this and all other training masks hold no foreground: check the masks")

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(number, len(self))
        # To NumPy the seeds (s, e) and (s, e, 0) are the same, so the shuffling takes 0 and the images count from 1.
        index = int(np.random.default_rng((self.seed, epoch, 0)).permutation(len(self))[place])
        image, mask, view, *statistics = self.decoded[index]
        # Of memory-mapped arrays only what the patch covers is read.
        return _to_tensors(*self.augment(image, mask, view, (self.seed, epoch, 1 + index)), statistics, self.kind)


class WholeImages(Dataset):
    """Whole images for validation and testing, of different sizes; items are (image, mask, name of the sample).

    float32 (3, H, W), normalised inside the field of view and 0 outside, reduced to `config.data.longest_side`; int64
    (H, W) with 255 for "ignore", of the same size or, if `native`, the file's. `UserError` as in `Decoded.check`.
    """

    def __init__(self, samples: Sequence[Sample], config: Config, native: bool = True) -> None:
        self.samples, self.config, self.decoded = list(samples), config, Decoded(samples, config)
        self.native = native and config.data.longest_side is not None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        if number not in range(len(self)):
            raise IndexError(number)  # ends a plain `for` loop
        image, mask, view, *statistics = self.decoded.check(number)
        if self.native:
            mask = load_sample(self.samples[number])[1]
            check_labels(mask, self.config.model.num_classes, self.samples[number].mask)
        return *_to_tensors(image, mask, view, statistics, self.config.data.normalisation), self.samples[number].name


def _to_tensors(image, mask, view, statistics: images.Statistics, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    normalised = images.normalise(image, view, statistics, kind).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(normalised)), torch.from_numpy(mask.astype(np.int64))
