"""Make sure that a data set is there and sound before anybody trains on it, and write down who is in which split.

Every image and mask is opened once: whatever is missing, damaged, of another size or oddly valued comes out here, with
the file's name, and not in the middle of the night in epoch 17.
"""

import csv
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet_helpers.config import IGNORE, DataConfig, UserError
from unet_helpers.datasets import Sample, find_samples, load_sample
from unet_helpers.pairing import HOW_TO_GET_DRIVE
from unet_helpers.splits import SPLITS

KAGGLE_DRIVE = "zionfuo/drive2004"  # public: kagglehub fetches it without a login
COLUMNS = ("image", "mask", "field_of_view", "group", "split")
MEANINGS = {
    "binary": "0 background, anything else foreground",
    "classes": "class indices, 255 ignored",
}


def prepare(config: DataConfig, output: Path, download: bool = False) -> str:
    """Fetch a data set if need be, check every file, and write `<output>/<name>_{train,val,test}.csv`.

    Args:
        config: which data set, where it lies and how it is split.
        output: folder of the CSV files, made if it does not exist; all three are written, or none.
        download: fetch DRIVE from Kaggle if it does not lie below `config.root`.

    Returns:
        A report of a few lines.

    Raises:
        UserError: naming the file and what is wrong with it, or saying what to download where.
    """
    if config.name == "drive" and download and not any(Path(config.root).expanduser().rglob("1st_manual")):
        _download_drive(Path(config.root).expanduser())
    samples = find_samples(config)
    counts = Counter(sample.split for sample in samples)
    if config.name == "drive" and (counts["train"] + counts["val"], counts["test"]) != (20, 20):
        found = f"{counts['train'] + counts['val']} training and {counts['test']} test images"
        raise UserError(f"{config.root}: {found}, but DRIVE has 20 of each: unpack all of it, or use data.name=folder")
    pixels, sizes, digests = np.zeros(256, np.int64), Counter(), {}
    notes = []
    for sample in samples:
        image, mask = load_sample(sample)
        pixels += np.bincount(mask.ravel(), minlength=256)
        sizes["×".join(map(str, mask.shape[::-1]))] += 1
        twin = digests.setdefault(hashlib.sha256(np.ascontiguousarray(image)).digest(), sample)
        if twin.split != sample.split:
            notes.append(f"note: {sample.image} ({sample.split}) is the same picture as {twin.image} ({twin.split})")
    paths = _write_lists(samples, output, config.name)
    return "\n".join([*_describe(config, samples, pixels, sizes), *notes, f"written: {', '.join(map(str, paths))}"])


def _describe(config: DataConfig, samples: Sequence[Sample], pixels: np.ndarray, sizes: Counter) -> list[str]:
    scored = max(1, pixels[:IGNORE].sum())
    shares = [f"class {value} {pixels[value] / scored:.1%}" for value in np.flatnonzero(pixels[:IGNORE])]
    common = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3))
    overrule = "; data.mask_values overrules it" if config.name == "folder" else ""
    lines = [
        f"{config.name}: {len(samples)} images with masks, all readable and of matching size",
        f"sizes (width×height): {common}{', ...' if len(sizes) > 3 else ''}",
        f"mask values: {samples[0].meaning} ({MEANINGS[samples[0].meaning]}){overrule}",
        f"pixels: {', '.join(shares)}; ignored {pixels[IGNORE] / pixels.sum():.1%} of all",
    ]
    for split in SPLITS:
        groups = [sample.group for sample in samples if sample.split == split]
        lines.append(f"{split}: {len(groups)} images in {len(set(groups))} groups")
    return lines


def _write_lists(samples: Sequence[Sample], output: Path, name: str) -> list[Path]:
    """Write the three lists under temporary names, then rename them."""
    output = Path(output)
    paths = [output / f"{name}_{split}.csv" for split in SPLITS]
    parts = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for split, part in zip(SPLITS, parts, strict=True):
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                rows = ([getattr(sample, column) for column in COLUMNS] for sample in samples if sample.split == split)
                writer.writerows(rows)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{output}: the lists cannot be written there ({error.strerror}): name another folder"
        ) from error
    finally:
        for part in parts:
            if output.is_dir():
                part.unlink(missing_ok=True)
    return paths


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
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"DRIVE could not be downloaded to {root} ({reason}): {HOW_TO_GET_DRIVE}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
