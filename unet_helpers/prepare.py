"""Make sure that a data set is there and sound before anybody trains on it, and write down who is in which split.

Every image and mask is opened: what is missing, damaged, of another size or oddly valued comes out here, with the
file's name, and not at night in epoch 17. `expand_offline` is the old way of augmenting.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from unet_helpers.catalogue import HOW_TO_GET, class_names, find_drive, missing, read_drive
from unet_helpers.config import IGNORE, Config, DataConfig, UserError, check_config, one_line
from unet_helpers.datasets import Sample, find_samples, load_sample
from unet_helpers.images import Colours, orientation, shrink
from unet_helpers.pairing import LIST, SPLIT_OF, SPLITS
from unet_helpers.plots import CELL, contact_sheet, overlay, to_png
from unet_helpers.system import make_folder, whole_file, write_error, write_table, write_whole

KAGGLE_DRIVE = "zionfuo/drive2004"  # public: kagglehub fetches it without a login
COLUMNS = ("image", "mask", "field_of_view", "group", "split")
FORMS = {"binary": "0 background, anything else foreground", "classes": "class indices, 255 ignored, no object numbers"}
SHEET = 12  # images on the contact sheet
NEARLY_EMPTY = 0.001  # share of foreground below which a mask is pointed out
MAX_ANGLE = 45.0  # degrees


def prepare(config: DataConfig, output: Path, download: bool = False) -> str:
    """Check every file of a data set, write `<output>/<name>_{train,val,test}.csv`, and return a report of a few lines.

    `<output>/<name>_sheet.png` shows a dozen images under their masks, for what no program sees. Nothing is written
    before all is checked; `download` fetches DRIVE from Kaggle if it is not below `config.root`. `UserError` names the
    file and what is wrong with it, or says what to download where.
    """
    check_config(Config(data=config))
    root, output = Path(os.path.expanduser(config.root)), Path(output)
    if config.name == "drive" and download and not find_drive(root):
        _download_drive(root)
    if config.name not in ("sample", "folder", "drive") and not root.is_dir():
        raise missing(config.name.split("-")[0], root, "no such folder")
    samples = find_samples(config)
    testing = sum(sample.split == "test" for sample in samples)
    if config.name == "drive" and (len(samples), testing) != (40, 20):
        found = f"{len(samples) - testing} training and {testing} test images"
        raise UserError(f"{root}: {found}, but DRIVE has 20 of each: unpack all of it, or use data.name=folder")
    pixels, sizes, digests, odd, shown = np.zeros(256, np.int64), Counter(), {}, defaultdict(list), {}
    on_sheet = {round(place) for place in np.linspace(0, len(samples) - 1, SHEET)}
    for index, sample in enumerate(tqdm(samples, "checking images", unit="image", leave=False, disable=None)):
        image, mask = load_sample(sample)
        counts = np.bincount(mask.ravel(), minlength=256)
        pixels += counts
        sizes["×".join(map(str, mask.shape[::-1]))] += 1
        if counts[1:IGNORE].sum() <= NEARLY_EMPTY * counts[:IGNORE].sum():
            odd[f"masks with no foreground, or less than {NEARLY_EMPTY:.1%}"].append(sample.mask)
        if config.name == "folder" and orientation(sample.image) != orientation(sample.mask):
            odd["EXIF data turn image or mask, but not both; compare them on the sheet"].append(sample.image)
        picture, drawn = (hashlib.sha256(np.ascontiguousarray(array)).digest() for array in (image, mask))
        twin, other = digests.setdefault(picture, (sample, drawn))
        if twin.split != sample.split:
            odd["same picture in two splits"].append(f"{sample.image} ({sample.split}), {twin.image} ({twin.split})")
        elif drawn != other:
            odd["same picture with two masks"].append(f"{sample.mask}, {twin.mask}")
        if index in on_sheet:
            shown[f"{sample.name} ({sample.split})"] = shrink(image, CELL), shrink(mask, CELL, is_mask=True)
    make_folder(output)
    paths = {split: output / f"{config.name}_{split}.csv" for split in SPLITS}
    rows = [vars(one) | {name: _listed(getattr(one, name), output) for name in COLUMNS[:3]} for one in samples]
    with ExitStack() as lists:  # they take their places when all of them are written
        for split, path in paths.items():
            write_table(lists.enter_context(whole_file(path)), COLUMNS, [row for row in rows if row["split"] == split])
    known = samples[0].meaning.values() if isinstance(samples[0].meaning, dict) else ()
    names = class_names(config, 1 + max({0, *np.flatnonzero(pixels).tolist(), *known} - {IGNORE}))
    paths["sheet"] = output / f"{config.name}_sheet.png"
    drawings = [overlay(image, mask, len(names)) for image, mask in shown.values()]
    write_whole(paths["sheet"], to_png(contact_sheet(drawings, list(shown), names)))
    notes = [f"note: {what}: {_some(files)}" for what, files in odd.items()]
    notes.append(f"written: {', '.join(map(str, paths.values()))}")
    return "\n".join([*_describe(config, samples, names, pixels, sizes), *notes, *_next(config, len(names))])


def _listed(path: str | None, folder: Path) -> str | None:
    """A file as a list in `folder` names it: from there if it lies below, so that both can be moved together."""
    full, home = os.path.abspath(path or ""), os.path.abspath(folder)
    return os.path.relpath(full, home) if path and Path(full).is_relative_to(home) else path


def _some(items: list[str]) -> str:
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


def _next(config: DataConfig, num_classes: int) -> list[str]:
    """The command that trains on a folder of one's own."""
    changed = {name: value for name, value in vars(config).items() if value != getattr(DataConfig, name)}
    flags = [f"--data.{k} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}" for k, v in changed.items()]
    flags += [f"--model.num_classes {num_classes}"] if num_classes > 2 else []
    return [f"next: python -m unet_helpers train {' '.join(flags)}"] if config.name == "folder" else []


def _describe(config: DataConfig, samples: list[Sample], names: list[str], pixels: np.ndarray, sizes) -> list[str]:
    scored, found = max(1, pixels[:IGNORE].sum()), np.flatnonzero(pixels[:IGNORE])
    shares = [f"{names[value]} {pixels[value] / scored:.1%}" for value in found]
    meaning = samples[0].meaning
    if config.name == "folder" and isinstance(meaning, Colours):
        meaning = "colours, " + ", ".join(f"#{colour:06x} = class {index}" for colour, index in meaning.items())
    elif isinstance(meaning, dict):
        form, style = ("colours", "#{:06x}") if isinstance(meaning, Colours) else ("labels", "{}")
        void = ", ".join(style.format(value) for value, index in meaning.items() if index == IGNORE)
        meaning = f"{len(set(meaning.values()) - {IGNORE})} classes from the set's own {form}; {void} ignored"
    else:
        meaning = f"{meaning} ({FORMS[meaning]})"
    common = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3))
    overrule = "; data.mask_values overrules it" if config.name == "folder" else ""
    groups = {split: [sample.group for sample in samples if sample.split == split] for split in SPLITS}
    lines = [
        f"{config.name}: {len(samples)} images with masks, all readable and of matching size",
        f"sizes (width×height): {common}{', ...' if len(sizes) > 3 else ''}",
        f"mask values: {meaning}{overrule}",
        f"pixels: {', '.join(shares)}; ignored {pixels[IGNORE] / pixels.sum():.1%} of all",
        *(f"{split}: {len(held)} images in {len(set(held))} groups" for split, held in groups.items()),
    ]
    whole = {"carvana": 5088, "camvid": 701, "nyuv2-13": 1449, "nyuv2-40": 1449}.get(config.name, len(samples))
    if rare := [f"{names[value]} ({pixels[value]} pixels)" for value in found if pixels[value] < scored / 10_000]:
        lines.append(f"note: classes that hardly occur, perhaps by a slip of the brush: {_some(rare)}")
    if len(samples) < whole:
        each = Counter(sample.group for sample in samples).values()
        lines.append(f"note: these are {len(samples)} of the {whole} images, {min(each)} to {max(each)} a group")
    ends = r"[\W_]*\d+\D*$", r"(?<=\d)\D*$", r"\.rf\..*"  # of names: the last number, or what follows it, or Roboflow's
    plain = ["/".join(part for part in one.name.split("/") if part not in SPLIT_OF) for one in samples]
    heads = (Counter(re.sub(end, "", name) for name in plain) for end in ends)
    alike = next((found for found in heads if 2 <= len(found) <= len(samples) // 2), None)
    if config.name == "folder" and alike and len({one.group for one in samples}) == len(samples):
        some = _some([f"{head}... ({count})" for head, count in alike.most_common()])
        lines.append(f"note: each image is its own group, even {some}: one patient? set data.group_pattern or {LIST}")
    sides = Counter(group for held in groups.values() for group in set(held))
    if torn := sorted(group for group, count in sides.items() if count > 1):
        lines.append(f"note: the standard split has frames of one film, {', '.join(torn)}, on several sides")
    if config.name == "rite":
        lines.append("note: the labels of the test images follow DRIVE's second observer, not the first")
    return lines


def _download_drive(root: Path) -> None:
    """Fetch DRIVE into `root/DRIVE`, whole or not at all."""
    target, part = root / "DRIVE", root / f".DRIVE.{os.getpid()}"
    if target.exists():
        raise UserError(f"{target}: is in the way, but holds no training/1st_manual: remove or complete it")
    try:
        import kagglehub

        fetched = kagglehub.dataset_download(KAGGLE_DRIVE)
        if (count := len(read_drive(Path(fetched)))) < 40:
            raise ValueError(f"{count} of its 40 images are in {fetched}: delete that folder")
        shutil.copytree(fetched, part, ignore=lambda at, names: [n for n in names if Path(at, n).is_symlink()])
        os.replace(part, target)
    except Exception as error:  # no network, no space, no permission, and whatever kagglehub raises
        reason = one_line(error)[:200]
        raise UserError(f"DRIVE could not be downloaded to {root} ({reason}): {HOW_TO_GET['drive']}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def expand_offline(config: DataConfig, output: Path | str, seed: int = 0) -> str:
    """Write a data set four times as large as `{train,test}/{image,mask}`, all PNG, and return one line about it.

    The original, both its flips and a rotation (`seed` draws its angle) turn DRIVE's 20 training images, validation
    included, into 80; test images stay as they are. Copies are named `<original>__<change>`, so that the folder data
    set keeps them in one group: with `data.val_share=0.15`, 3 originals validate with all their copies, 12 of 80. Masks
    hold class indices and 255. `output` must be empty or not exist yet, and is written whole or not at all.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is in the way: name a folder that is empty or does not exist yet")
    samples, part = find_samples(config), output.with_name(f".{output.name}.{os.getpid()}")
    rng, counts = np.random.default_rng(seed), {"train": 0, "test": 0}
    try:
        for folder in ("train/image", "train/mask", "test/image", "test/mask"):
            (part / folder).mkdir(parents=True)
        for sample in samples:
            split = "test" if sample.split == "test" else "train"
            name, group = (re.sub(r"[/\\:\0_]+", "_", text) for text in (sample.name, sample.group))
            stem = name if group == name else f"{group}__{name}"  # what comes before the first `__` is the group
            image, mask = load_sample(sample)
            image = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
            copies = {"": (image, mask)}
            if split == "train":
                copies |= {"__hflip": (image[:, ::-1], mask[:, ::-1]), "__vflip": (image[::-1], mask[::-1])}
                copies["__rotated"] = _rotate(image, mask, rng.uniform(-MAX_ANGLE, MAX_ANGLE))
            for change, pictures in copies.items():
                for kind, picture in zip(("image", "mask"), pictures, strict=True):
                    target = part / split / kind / f"{stem}{change}.png"
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


def _rotate(image: np.ndarray, mask: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    return turned, cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE)
