"""The public data sets: how to get them, where at any depth their files lie, and what numbers in their labels mean."""

import glob
import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from unet_helpers.config import IGNORE, DataConfig, UserError, one_line
from unet_helpers.images import Colours, Meaning, list_images
from unet_helpers.pairing import SPLITS, Pair, pair_by_name

NYUV2_FILE = "nyu_depth_v2_labeled.mat"
CARVANA_FOLDERS = ("train", "train_images", "val_images", "test_images")  # beside `train_hq`, and `test` without masks
TABLES = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))  # texts and class maps
# `to_40` of labels 1 to 894 (Gupta et al. 2013), `to_13` of 1 to 40 (Couprie et al. 2013), `names_40`, `names_13`, and
# `train`, the numbers of the training images (Silberman et al. 2012); all count from 1.
HOW_TO_GET, NYUV2 = TABLES["how_to_get"], TABLES["nyuv2"]
CLASS_NAMES = TABLES["class_names"] | {"nyuv2-13": NYUV2["names_13"], "nyuv2-40": NYUV2["names_40"]}
# RITE: red arteries, blue veins; white where nobody can tell or, like green, where they cross.
RITE_COLOURS = Colours({0x000000: 0, 0xFF0000: 1, 0x0000FF: 2, 0xFFFFFF: IGNORE, 0x00FF00: IGNORE})
CAMVID_LABELS = {value: value for value in range(11)} | {11: IGNORE}  # 11 is void
MEANINGS = {"drive": "binary", "rite": RITE_COLOURS, "carvana": "binary", "camvid": CAMVID_LABELS}  # of mask values


def class_names(config: DataConfig, num_classes: int) -> list[str]:
    """Names of the classes of a data set, `class 0`, `class 1`, ... where they are not known."""
    labels = {"sample": config.labels, "drive": "vessels", "rite": "artery_vein"}.get(config.name, config.name)
    names, count = CLASS_NAMES.get(labels, []), max(2, num_classes)
    return names if len(names) == count else [f"class {index}" for index in range(count)]


def missing(name: str, root: Path, what: str) -> UserError:
    """The error that says that a set, or a part of it, is not there, and how to get it."""
    return UserError(f"{root}: {what}: {HOW_TO_GET[name]}")


def read_public(name: str, root: Path, observer: int = 1) -> tuple[list[Pair], list[str], Meaning]:
    """Pairs of a data set, their groups, and what mask values mean; `UserError` unless all is below `root`."""
    if name.startswith("nyuv2"):
        pairs, meaning = read_nyuv2(root, int(name[-2:]))
        return pairs, [pair.folders[0] if pair.folders else pair.image.stem for pair in pairs], meaning
    readers = {"drive": read_drive, "rite": read_rite, "carvana": read_carvana, "camvid": read_camvid}
    pairs = read_drive(root, observer) if observer == 2 else readers[name](root)
    # Carvana's names begin with the car, then comes the angle; CamVid's with the film sequence.
    group = {"carvana": lambda stem: stem[:12], "camvid": lambda stem: stem.split("_")[0]}.get(name, str)
    return pairs, [group(pair.image.stem) for pair in pairs], MEANINGS[name]


def _find(root: Path | str, name: str) -> list[Path]:
    """What is called `name` at any depth below `root`, the least deep first."""
    found = glob.iglob(f"**/{name}", root_dir=root, recursive=True)  # unlike `rglob` it follows links
    return sorted((Path(root, path) for path in found), key=lambda path: (len(path.parts), path))


def find_drive(root: Path | str) -> list[Path]:
    """Folders at any depth below `root` that hold DRIVE's `training` and `test`, the least deep first."""
    return list(dict.fromkeys(path.parent.parent for path in _find(root, "1st_manual")))


def read_drive(root: Path, observer: int = 1) -> list[Pair]:
    """DRIVE's official layout, `{training,test}/{images,1st_manual,mask}`; in `test/2nd_manual` a second observer."""
    homes, pairs = find_drive(root), []
    if not homes:
        raise missing("drive", root, "no DRIVE below it (no folder training/1st_manual)")
    if len(homes) > 1 and len(homes[1].parts) == len(homes[0].parts):
        raise UserError(f"{root}: DRIVE lies there twice, {homes[0]} and {homes[1]}: set data.root to one of them")
    for folder, split in (("training", "train"), ("test", "test"))[observer - 1 :]:
        places = [homes[0] / folder / part for part in ("images", ("1st", "2nd")[observer - 1] + "_manual", "mask")]
        images, masks, views = parts = [_by_number(place) for place in places]
        for number in sorted(set().union(*parts)):
            held = [part.get(number) for part in parts]
            if None in held:
                path, place = next(filter(None, held)), places[held.index(None)]
                raise UserError(f"{path}: no file of this number in {place}: unpack DRIVE again, all of it")
        pairs += [Pair(images[key], masks[key], split, field_of_view=views[key]) for key in images]
    return pairs


def _by_number(folder: Path) -> dict[str, Path]:
    """Files of a DRIVE folder by the number their names begin with."""
    files = {}
    for path in list_images(folder):
        number = re.match(r"\d*", path.name).group()
        if not number or number in files:
            raise UserError(f"{path}: no file of DRIVE, whose names begin with a number, each with another: remove it")
        files[number] = path
    return files


def read_rite(root: Path) -> list[Pair]:
    """DRIVE with RITE's masks, `AV_groundTruth/{training,test}/av`; the test ones follow DRIVE's second observer."""
    homes, pairs = _find(root, "AV_groundTruth"), []
    if not homes:
        raise missing("rite", root, "no RITE below it (no folder AV_groundTruth)")
    masks = {split: _by_number(homes[0] / folder / "av") for split, folder in (("train", "training"), ("test", "test"))}
    for pair in read_drive(root):
        number = re.match(r"\d*", pair.image.name).group()
        if number not in masks[pair.split]:
            raise missing("rite", homes[0], f"no label picture number {number} ({pair.split})")
        pairs.append(pair._replace(mask=masks[pair.split][number]))
    return pairs


def read_carvana(root: Path) -> list[Pair]:
    """Carvana as Kaggle's archives unpack, or in `{train,val,test}_{images,masks}`, whose split tears cars apart."""
    found = [Path(path) for path in glob.iglob("**/*_masks/*_mask.gif", root_dir=root, recursive=True)]
    masks = {root / path for path in found}
    homes = {root / next(p.parent for p in reversed(path.parents) if p.name.endswith("_masks")) for path in found}
    folders = [home / name for home in homes for name in CARVANA_FOLDERS]
    folders += [folder / folder.name for folder in folders]
    images = sorted(path for folder in folders for path in folder.glob("*.jpg"))
    if not images:
        raise missing("carvana", root, f"no Carvana below it (no images beside its {len(masks)} masks)")
    by_name = {path.name.removesuffix("_mask.gif"): path for path in masks}
    twice = Counter(path.stem for path in images).most_common(1)[0]
    if len(by_name) < len(masks) or twice[1] > 1:
        raise UserError(f"{root}: Carvana lies there twice, {twice[0]} for one: set data.root to one of them")
    if lonely := sorted(by_name.keys() ^ {path.stem for path in images}):
        raise missing("carvana", root, f"{lonely[0]} and {len(lonely) - 1} others have an image or a mask, not both")
    return [Pair(path, by_name[path.stem], "") for path in images]


def read_camvid(root: Path) -> list[Pair]:
    """CamVid in SegNet's form and with its split: `{train,val,test}` and `{train,val,test}annot`, 480 x 360."""
    found, pairs = _find(root, "trainannot"), []
    if not found:
        raise missing("camvid", root, "no CamVid below it (no folder trainannot)")
    for split in SPLITS:
        images, masks = (list_images(found[0].parent / folder) for folder in (split, f"{split}annot"))
        pairs += [Pair(image, mask, split) for image, mask in pair_by_name(images, masks).items()]
    return pairs


def nyuv2_classes(source: int, target: int) -> dict[int, int]:
    """What the labels of NYUv2's 894, 40 or 13 classes are among its 40 or 13; 0, unlabelled, becomes 255."""
    classes = {label: label for label in range(source + 1)}
    for step in (40, 13):
        if target <= step < source:
            classes = {label: [0, *NYUV2[f"to_{step}"]][value] for label, value in classes.items()}
    return {label: value - 1 if value else IGNORE for label, value in classes.items()}


MEANINGS |= {f"nyuv2-{classes}": nyuv2_classes(classes, classes) for classes in (13, 40)}


def read_nyuv2(root: Path, classes: int) -> tuple[list[Pair], Meaning]:
    """NYUv2's pairs and the meaning of its labels, for 13 or 40 classes; label 0 is unlabelled.

    From the official file (MATLAB 7.3), whose pairs have the image's number, from 0, and its scene for a folder, since
    views of one room belong together; or from label PNGs `*_13` or `*_40` and pictures in `rgb`, numbered from 1.
    """
    if files := _find(root, NYUV2_FILE):
        with open_nyuv2(files[0]) as file:
            scenes = ["".join(map(chr, file[reference][:].ravel())) for reference in file["scenes"][:].ravel()]
        pairs = [Pair(files[0], files[0], "", (scene,), number=number) for number, scene in enumerate(scenes)]
        numbers, source = range(1, 1 + len(pairs)), 894
    else:
        source = next((n for n in (classes, 40) if _find(root, f"*_{n}.png")), None)
        if source is None:
            raise missing("nyuv2", root, f"neither {NYUV2_FILE} nor label PNGs named *_{classes}.png below it")
        pictures = [p for p in _find(root, "*") if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
        masks = {_number(path.stem[:-3]): path for path in pictures if path.stem.endswith(f"_{source}")}
        images = {_number(p.stem): p for p in pictures if not re.search("_(13|40)$", p.stem) and "rgb" in p.parent.name}
        if lonely := sorted(masks.keys() ^ images.keys()):
            path = masks.get(lonely[0]) or images[lonely[0]]
            raise missing("nyuv2", path, "no partner of this number among the label PNGs and the folder `rgb`")
        pairs, numbers = [Pair(images[number], masks[number], "") for number in sorted(masks)], sorted(masks)
    train, numbered = set(NYUV2["train"]), zip(pairs, numbers, strict=True)
    return [p._replace(split="" if n in train else "test") for p, n in numbered], nyuv2_classes(source, classes)


def _number(stem: str) -> int:
    """The last number in a name, 0 if there is none."""
    return int((re.findall(r"\d+", stem) or [0])[-1])


@contextmanager
def open_nyuv2(path: Path | str):
    """Open the official file; `UserError` if it, or what is read from it meanwhile, is something else or damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if wanted := {"images", "labels", "scenes"} - set(file):
                raise UserError(f"{path}: holds no {', '.join(sorted(wanted))}: get the labelled file of NYUv2")
            yield file
    except (OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no MATLAB 7.3 file, or cut short ({one_line(error)}): get it again") from error


def load_nyuv2(path: Path | str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 (H, W, 3) and its labels uint16 (H, W): MATLAB's axes come in reverse order from HDF5."""
    with open_nyuv2(path) as file:
        image, labels = file["images"][number].transpose(2, 1, 0), file["labels"][number].T
        if image.shape != (*labels.shape, 3) or (image.dtype, labels.dtype) != (np.uint8, np.uint16):
            raise ValueError(f"image {number} and its labels do not go together")
        return image, labels
