"""Make sure that a data set is there and sound before anybody trains on it, and write down who is in which split.

Every image and mask is opened once: whatever is missing, damaged, of another size or oddly valued comes out here, with
the file's name, and not in the middle of the night in epoch 17. `expand_offline` is the old way of augmenting, to be
compared with augmentation on the fly, which never shows the same patch twice.
"""

import csv
import hashlib
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from unet_helpers.catalogue import HOW_TO_GET, class_names, find_drive, missing
from unet_helpers.config import IGNORE, Config, DataConfig, UserError, check_config, one_line
from unet_helpers.datasets import Sample, find_samples, load_sample
from unet_helpers.pairing import SPLITS
from unet_helpers.system import make_folder, write_error, write_whole

KAGGLE_DRIVE = "zionfuo/drive2004"  # public: kagglehub fetches it without a login
COLUMNS = ("image", "mask", "field_of_view", "group", "split")
MEANINGS = {"binary": "0 background, anything else foreground", "classes": "class indices, 255 ignored"}
MAX_ANGLE = 45.0  # degrees


def prepare(config: DataConfig, output: Path, download: bool = False) -> str:
    """Fetch a data set if need be, check every file, and write `<output>/<name>_{train,val,test}.csv`.

    Args:
        config: which data set, where it lies and how it is split.
        output: folder of the CSV files, made if it does not exist; nothing is written before all is checked.
        download: fetch DRIVE from Kaggle if it does not lie below `config.root`.

    Returns:
        A report of a few lines.

    Raises:
        UserError: naming the file and what is wrong with it, or saying what to download where.
    """
    check_config(Config(data=config))
    root, output = Path(config.root).expanduser(), Path(output)
    if config.name == "drive" and download and not find_drive(root):
        _download_drive(root)
    if config.name not in ("sample", "folder", "drive") and not root.is_dir():
        raise missing(config.name.split("-")[0], root, "no such folder")
    samples = find_samples(config)
    counts = Counter(sample.split for sample in samples)
    if config.name == "drive" and (counts["train"] + counts["val"], counts["test"]) != (20, 20):
        found = f"{counts['train'] + counts['val']} training and {counts['test']} test images"
        raise UserError(f"{root}: {found}, but DRIVE has 20 of each: unpack all of it, or use data.name=folder")
    pixels, sizes, digests, notes = np.zeros(256, np.int64), Counter(), {}, _notes(config, samples)
    for sample in tqdm(samples, "checking images", unit="image", leave=False, disable=None):
        image, mask = load_sample(sample)
        pixels += np.bincount(mask.ravel(), minlength=256)
        sizes["×".join(map(str, mask.shape[::-1]))] += 1
        twin = digests.setdefault(hashlib.sha256(np.ascontiguousarray(image)).digest(), sample)
        if twin.split != sample.split:
            notes.append(f"note: {sample.image} ({sample.split}) is the same picture as {twin.image} ({twin.split})")
    make_folder(output)
    paths = {split: output / f"{config.name}_{split}.csv" for split in SPLITS}
    for split, path in paths.items():
        write_whole(path, _list([sample for sample in samples if sample.split == split]))
    written = f"written: {', '.join(map(str, paths.values()))}"
    return "\n".join([*_describe(config, samples, pixels, sizes), *notes, written])


def _describe(config: DataConfig, samples: Sequence[Sample], pixels: np.ndarray, sizes: Counter) -> list[str]:
    scored, found = max(1, pixels[:IGNORE].sum()), np.flatnonzero(pixels[:IGNORE])
    names = class_names(config, 1 + int(found.max(initial=0)))
    shares = [f"{names[value]} {pixels[value] / scored:.1%}" for value in found]
    meaning = samples[0].meaning
    if isinstance(meaning, dict):
        form = "colours" if max(meaning) > 2**16 else "labels"
        void = ", ".join(f"#{v:06x}" if form == "colours" else str(v) for v, k in meaning.items() if k == IGNORE)
        meaning = f"{len(set(meaning.values()) - {IGNORE})} classes from the set's own {form}; {void} ignored"
    else:
        meaning = f"{meaning} ({MEANINGS[meaning]})"
    common = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3))
    overrule = "; data.mask_values overrules it" if config.name == "folder" else ""
    lines = [
        f"{config.name}: {len(samples)} images with masks, all readable and of matching size",
        f"sizes (width×height): {common}{', ...' if len(sizes) > 3 else ''}",
        f"mask values: {meaning}{overrule}",
        f"pixels: {', '.join(shares)}; ignored {pixels[IGNORE] / pixels.sum():.1%} of all",
    ]
    for split in SPLITS:
        groups = [sample.group for sample in samples if sample.split == split]
        lines.append(f"{split}: {len(groups)} images in {len(set(groups))} groups")
    return lines


def _notes(config: DataConfig, samples: Sequence[Sample]) -> list[str]:
    """What is particular about a public data set, or missing from it."""
    whole = {"carvana": 5088, "camvid": 701, "nyuv2-13": 1449, "nyuv2-40": 1449}.get(config.name, len(samples))
    notes = [f"note: these are {len(samples)} of the {whole} images of the set"] if len(samples) < whole else []
    sides = {}
    for sample in samples:
        sides.setdefault(sample.group, set()).add(sample.split)
    if torn := sorted(group for group, splits in sides.items() if len(splits) > 1):
        notes.append(f"note: the standard split has frames of one film, {', '.join(torn)}, on several sides")
    if config.name == "rite":
        notes.append("note: the labels of the test images follow DRIVE's second observer, not the first")
    return notes


def _list(samples: Sequence[Sample]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(sample, column) for column in COLUMNS] for sample in samples)
    return table.getvalue()


def _download_drive(root: Path) -> None:
    """Fetch DRIVE into `root/DRIVE`, whole or not at all."""
    target, part = root / "DRIVE", root / f".DRIVE.{os.getpid()}"
    if target.exists():
        raise UserError(f"{target}: is in the way, but holds no training/1st_manual: remove or complete it")
    try:
        import kagglehub

        fetched = Path(kagglehub.dataset_download(KAGGLE_DRIVE))
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(fetched, part)
        os.replace(part, target)
    except Exception as error:  # no network, no space, no permission, and whatever kagglehub raises
        reason = one_line(error)[:200]
        raise UserError(f"DRIVE could not be downloaded to {root} ({reason}): {HOW_TO_GET['drive']}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def expand_offline(config: DataConfig, output: Path | str, seed: int = 0) -> str:
    """Write a data set four times as large as `{train,test}/{image,mask}`, all PNG; test images once, unchanged.

    The original, a horizontal flip, a vertical flip and a rotation turn DRIVE's 20 training images into 80. Training
    and validation images both go to `train`: train on it with `data.name=folder` and `data.val_share=0.15`, and 3 of
    the 20 originals with all their copies validate, 12 of 80. Copies are named `<original>__<change>`, by which the
    folder data set keeps them in their original's group; drawn at random instead, nearly every validation image would
    have a copy among the training images. Masks hold class indices and 255.

    `output` must not exist yet or be empty, and is written whole or not at all; `seed` is that of the angles of
    rotation. Returns one line saying what was written.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is in the way: name a folder that is empty or does not exist yet")
    samples = find_samples(config)
    part = output.with_name(f".{output.name}.{os.getpid()}")
    rng, counts = np.random.default_rng(seed), {"train": 0, "test": 0}
    try:
        for split in counts:
            for kind in ("image", "mask"):
                (part / split / kind).mkdir(parents=True)
        for sample in samples:
            split = "test" if sample.split == "test" else "train"
            image, mask = load_sample(sample)
            if image.dtype != np.uint8:
                image = (image * 255).round().astype(np.uint8)
            copies = {"": (image, mask)}
            if split == "train":
                copies = _copies(image, mask, rng.uniform(-MAX_ANGLE, MAX_ANGLE))
            for change, pictures in copies.items():
                for kind, picture in zip(("image", "mask"), pictures, strict=True):
                    target = part / split / kind / f"{_stem(sample)}{change}.png"
                    if target.exists():
                        raise UserError(f"{sample.image}: another image would also be called {target.name}: rename it")
                    Image.fromarray(picture).save(target)
            counts[split] += len(copies)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    except OSError as error:
        raise write_error(output, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{output}: {counts['train']} training images (each original four times), {counts['test']} test images"


def _copies(image: np.ndarray, mask: np.ndarray, angle: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The original and its three changed copies, image and mask, by the ending of their names."""
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    turned_mask = cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE)
    return {
        "": (image, mask),
        "__hflip": (image[:, ::-1], mask[:, ::-1]),
        "__vflip": (image[::-1], mask[::-1]),
        "__rotated": (turned, turned_mask),
    }


def _stem(sample: Sample) -> str:
    """A file name whose part before the first `__` is the sample's group."""
    name, group = (re.sub(r"[/_]+", "_", text) for text in (sample.name, sample.group))
    return name if group == name else f"{group}__{name}"
