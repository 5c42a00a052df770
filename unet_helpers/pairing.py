"""Which mask belongs to which image, told by the names of folders and files alone.

Every data set names its files in its own way: `img/7.jpg` and `label/7_mask.png`, `train/a.jpg` and
`train_masks/a_mask.gif`, `01_test.tif` and `01_manual1.gif`. Words that only say "I am an image" or "I am a mask" are
struck out of the names; what is left must be the same on both sides, and must not fit twice.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unet_helpers.config import DataConfig, UserError
from unet_helpers.images import list_images

IMAGE_WORDS = r"images?|imgs?|pictures?|photos?|inputs?|jpegimages|frames?"
MASK_WORDS = (
    r"masks?|labels?|annot(?:ation)?s?|gts?|ground[-_ ]?truths?|seg(?:mentation)?s?(?:class)?|(?:1st[-_ ])?manual"
    r"|targets?"
)
SPLIT_OF = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
SPLIT_OF |= {name: name for name in ("train", "val", "test")}
NOTHING = "$^"  # matches no word
HOW_TO_GET_DRIVE = (
    "let `python -m unet_helpers prepare drive` fetch it, or download "
    "https://www.kaggle.com/datasets/zionfuo/drive2004 and unpack it there"
)


class Pair(NamedTuple):
    """An image, its mask, the split that its folder names ("" if none), other folders it lies in, its field of view."""

    image: Path
    mask: Path
    split: str
    folders: tuple[str, ...] = ()
    field_of_view: Path | None = None


def read_folder(root: Path) -> list[Pair]:
    """Find every image below `root` with its mask, sorted by path.

    Image and mask folders may lie side by side (`train/image`, `train/mask`), the other way round (`images/train`,
    `masks/train`), carry the word in their names (`train`, `train_masks`), or be one folder with masks named as such.

    Raises:
        UserError: if there are no pictures, an image has no mask or the reverse, or a name fits twice.
    """
    places: dict[tuple[str, ...], dict[bool, list[Path]]] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith((".", "__"))]
        is_mask, place = _place(Path(folder).relative_to(root))
        try:
            places.setdefault(place, {}).setdefault(is_mask, []).extend(list_images(folder) if names else [])
        except UserError:  # no pictures here
            continue
    pairs = []
    for place, files in sorted(places.items()):
        images, masks = sorted(files.get(False, [])), sorted(files.get(True, []))
        if not masks:  # perhaps side by side in one folder
            masks = [path for path in images if _tokens(path, MASK_WORDS) != _tokens(path, NOTHING)]
            images = [path for path in images if path not in masks]
        matched = pair_by_name(images, masks)
        if unused := set(masks) - set(matched.values()):
            raise UserError(f"{min(unused)}: no image with a matching name: add it, or move the mask elsewhere")
        splits = [part for part in place if part in SPLIT_OF]
        others = tuple(part for part in place if part not in SPLIT_OF)
        pairs += [Pair(image, mask, splits[0] if splits else "", others) for image, mask in matched.items()]
    if not pairs:
        raise UserError(
            f"{root}: no pictures below it: put photographs in {root / 'images'} and their masks in {root / 'masks'}"
        )
    return pairs


def _place(folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether a folder is one of masks, and the folders on the way there without the words for image and mask."""
    has_masks, parts = False, []
    for part in folder.parts:
        rest, is_mask = _strip(part.lower(), MASK_WORDS)
        has_masks |= is_mask
        rest = rest if is_mask else _strip(rest, IMAGE_WORDS)[0]
        parts += [SPLIT_OF.get(rest, rest)] if rest else []
    return has_masks, tuple(parts)


def _strip(name: str, words: str) -> tuple[str, bool]:
    """A folder's name without a leading or trailing word of `words`, and whether there was one."""
    found = re.match(rf"^(.*?)[-_ ]*(?:{words})$", name) or re.match(rf"^(?:{words})[-_ ]+(.*)$", name)
    return (found.group(1), True) if found else (name, False)


def pair_by_name(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Find the mask of each image: of equal stem, or equal without `_mask`, `_manual1`, `img_`, `_test`, and the like.

    Raises:
        UserError: naming an image that has no mask, or two files that cannot be told apart.
    """
    found: dict[Path, Path] = {}
    for image_words, mask_words in ((NOTHING, NOTHING), ("|".join([IMAGE_WORDS, *SPLIT_OF]), MASK_WORDS)):
        left = [path for path in images if path not in found]
        right = [path for path in masks if path not in found.values()]
        by_key: list[dict] = [{}, {}]
        for side, files, words in ((0, left, image_words), (1, right, mask_words)):
            for path in files:
                by_key[side].setdefault(_tokens(path, words), []).append(path)
        for key in by_key[0].keys() & by_key[1].keys():
            for files in (by_key[0][key], by_key[1][key]):
                if len(files) > 1:
                    raise UserError(f"{files[0]}: its name does not tell it from {files[1].name}: rename or remove one")
            found[by_key[0][key][0]] = by_key[1][key][0]
    if missing := [path for path in images if path not in found]:
        more = f" (nor have {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: this image has no mask{more}: add the mask, or move the image elsewhere")
    return {image: found[image] for image in images}


def _tokens(path: Path, words: str) -> tuple[str, ...]:
    """The parts of a file's stem without those that only say what kind of file it is; numbers stay (`mask01`: 01)."""
    if words == NOTHING:
        return (path.stem,)
    tokens = re.split(r"[-_.\s()]+", path.stem.lower())
    tokens = [re.sub(rf"^(?:manual\d*$|(?:{words})(?=\d*$))", "", token) for token in tokens]
    return tuple(token for token in tokens if token)


def read_drive(root: Path, observer: int = 1) -> list[Pair]:
    """Find DRIVE's official layout at any depth below `root`: `{training,test}/{images,1st_manual,mask}`.

    The second observer (`test/2nd_manual`) drew the test images only. Raises `UserError` for anything missing.
    """
    homes = sorted({path.parent.parent for path in root.rglob("1st_manual")}, key=lambda path: (len(path.parts), path))
    if not homes:
        raise UserError(f"{root}: no DRIVE below it (no folder training/1st_manual): {HOW_TO_GET_DRIVE}")
    if len(homes) > 1 and len(homes[1].parts) == len(homes[0].parts):
        raise UserError(f"{root}: DRIVE lies there twice, {homes[0]} and {homes[1]}: set data.root to one of them")
    pairs = []
    for folder, split in (("training", "train"), ("test", "test"))[observer - 1 :]:
        home = homes[0] / folder
        images, masks, views = (
            _by_number(home / part) for part in ("images", ("1st", "2nd")[observer - 1] + "_manual", "mask")
        )
        for other in (masks, views):
            if wrong := sorted(images.keys() ^ other.keys()):
                lonely = images.get(wrong[0]) or other[wrong[0]]
                partner = next(iter((other if wrong[0] in images else images).values())).parent
                raise UserError(f"{lonely}: no file of this number in {partner}: unpack DRIVE again, all of it")
        pairs += [Pair(images[key], masks[key], split, field_of_view=views[key]) for key in images]
    return pairs


def _by_number(folder: Path) -> dict[str, Path]:
    """Files of a DRIVE folder by the number their names begin with."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, so DRIVE is not complete: {HOW_TO_GET_DRIVE}")
    files: dict[str, Path] = {}
    for path in list_images(folder):
        number = re.match(r"\d*", path.name).group()
        if not number or number in files:
            raise UserError(
                f"{path}: does not belong in a folder of DRIVE (names begin with a number, once): remove it"
            )
        files[number] = path
    return files


def groups_by_name(pairs: Sequence[Pair], pattern: str) -> list[str]:
    """The group of each image: what `data.group_pattern` finds in the stem of its name.

    `train/0.png` and `test/0.png` are two pictures, each a group of its own, unless a pattern of the user's, or a copy
    such as `0__hflip.png`, says that equal names mean the same thing.
    """
    groups = []
    for pair in pairs:
        try:
            groups.append(re.match(pattern, pair.image.stem).group(1) or "")
        except (re.error, IndexError, AttributeError) as error:
            raise UserError(
                f"{pair.image}: its name does not fit data.group_pattern '{pattern}': change it; it must match "
                "the start of every name and hold one group in brackets"
            ) from error
    copied = {group for pair, group in zip(pairs, groups, strict=True) if group != pair.image.stem}
    if pattern != DataConfig.group_pattern:
        return groups
    return [
        group if group in copied else "/".join(filter(None, [pair.split, *pair.folders, group]))
        for pair, group in zip(pairs, groups, strict=True)
    ]
