"""Which files belong together: an image with its mask, the pictures of one group, the groups on one side of a split.

A group (one eye with its augmented copies, one car with its 16 views) must not be torn apart: near-copies of training
images would be in the test set, and the score would measure memory.
"""

import csv
import io
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import numpy as np

from unet_helpers.config import DataConfig, UserError, one_line
from unet_helpers.images import list_images

SPLITS = ("train", "val", "test")
SPLIT_OF = {"training": "train", "validation": "val", "valid": "val", "testing": "test"} | {x: x for x in SPLITS}
IMAGE_WORDS = r"images?|imgs?|pictures?|photos?|inputs?|jpegimages|frames?|originals?(?:[-_ ]images?)?|rgb|sat|ome"
MASK_WORDS = r"masks?|label(?:led|ed|s)?|annot(?:ation)?s?|gts?|ground[-_ ]?truths?|targets?|trimaps?|1stho"
MASK_WORDS += r"|seg(?:mentation)?s?(?:class(?:png)?)?|(?:1st[-_ ])?manual\d*"
SHEETS = {f"{name}_sheet.png" for name in get_args(get_type_hints(DataConfig)["name"])}  # drawn by `prepare`
LIST = "pairs.csv"  # at the top of a folder: says what belongs together


class Pair(NamedTuple):
    """An image and what belongs to it."""

    image: Path
    mask: Path
    split: str  # that its folder names, "" if none
    folders: tuple[str, ...] = ()  # others that it lies in
    field_of_view: Path | None = None
    number: int | None = None  # within a file of many images
    group: str = ""  # that a list names


def read_folder(root: Path) -> list[Pair]:
    """Find every image below `root` with its mask, sorted by path.

    Folders may be `train/image` and `train/mask`, `images/train` and `masks/train`, `train` and `train_masks`, or one
    that holds both. A CSV file in place of `root`, or `pairs.csv` in it, is followed instead, see `read_list`. Raises
    `UserError` if there is no picture, one has no partner, a name fits twice, or a folder below cannot be read.
    """
    if root.is_file() or (root / LIST).is_file():
        return read_list(root if root.is_file() else root / LIST)

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): allow it, or move it away") from error

    places: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = {}
    seen = {os.path.realpath(root)}  # links may lead to a folder twice, or round in circles
    for folder, below, _ in os.walk(root, onerror=refuse, followlinks=True):
        paths = [os.path.join(folder, name) for name in sorted(below) if not name.startswith((".", "__"))]
        below.clear()
        for path in sorted(paths, key=os.path.islink):  # what is really there comes before links to it
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                below.append(os.path.basename(path))
        is_mask, place = _place(Path(folder).relative_to(root))
        with suppress(UserError):  # no pictures here
            found = places.setdefault(place, ([], []))[is_mask]
            found += [path for path in list_images(folder) if path.name not in SHEETS]
    pairs = []
    for place, (images, masks) in sorted(places.items()):
        images, masks = sorted(images), sorted(masks)
        if not (images and masks):  # perhaps side by side in one folder, be it called `lgg-mri-segmentation`
            named = [p for p in images + masks if any(re.fullmatch(rf"({MASK_WORDS})\d*", x) for x in _words(p))]
            images, masks = sorted({*images, *masks} - {*(named or masks)}), named or masks
        matched = pair_by_name(images, masks)
        if unused := set(masks) - set(matched.values()):
            raise UserError(f"{min(unused)}: no image is left for it: rename, merge or move it, or write {LIST}")
        split = next((part for part in place if part in SPLIT_OF), "")
        pairs += [Pair(image, mask, split, place) for image, mask in matched.items()]
    if not pairs:
        raise UserError(f"{root}: no pictures below it: put them, as PNG, in {root}/images, masks in {root}/masks")
    return pairs


def read_list(path: Path) -> list[Pair]:
    """Read a CSV file with the columns image and mask and, if wanted, field_of_view, group, split (names in any case).

    Paths start from its folder and stay below it, so that a stranger's list opens no other file: else `UserError`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets mark UTF-8
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count))
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or []]
        rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a list ({one_line(error)}): save it as CSV in UTF-8") from error
    if not {"image", "mask"} <= set(table.fieldnames) or not rows:
        raise UserError(f"{path}: must hold a line with the column names image and mask, and a line for each image")
    pairs, taken = [], set()
    for line, row in rows:
        place = f"{path} line {line}"
        cells = {name: (cell or "").strip() for name, cell in row.items() if name is not None}  # None: too many cells
        split = cells.get("split", "").lower()
        if split and split not in SPLIT_OF:
            raise UserError(f"{place}: there is no split `{one_line(split)}`: name train, val, test, or nothing")
        image, mask = (_listed(path, cells[name], place) for name in ("image", "mask"))
        view = _listed(path, cells["field_of_view"], place) if cells.get("field_of_view") else None
        folders = image.relative_to(path.parent).parts[:-1]
        if image.with_suffix("") in taken:
            raise UserError(f"{place}: {one_line(cells['image'])} has the name of an image above: rename or remove one")
        taken.add(image.with_suffix(""))
        pairs.append(Pair(image, mask, SPLIT_OF.get(split, ""), folders, view, None, cells.get("group", "")))
    return pairs


def _listed(table: Path, name: str, place: str) -> Path:
    """The file that a list calls `name`, whichever Unicode form the disk keeps its name in."""
    home = os.path.abspath(table.parent)
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name.replace("\\", "/")):
        full = os.path.abspath(os.path.join(home, form))
        if not Path(full).is_relative_to(home):
            raise UserError(f"{place}: {one_line(name)} lies outside {table.parent}: move the list above all its files")
        if os.path.isfile(full):
            return table.parent / os.path.relpath(full, home)
    raise UserError(f"{place}: there is no file `{one_line(name)}`: paths start from the folder of the list")


def _place(folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether a folder is one of masks, and the folders on the way there without the words for image and mask."""
    mark, parts = None, []  # what a mask folder is called beside the word for it
    for part in map(str.lower, folder.parts):
        rest = _strip(part, MASK_WORDS)
        # Images may lie in what is called `people_segmentation/images`; the frames of `masks/frames` are masks.
        mark = rest if rest != part else (None if mark and _strip(part, IMAGE_WORDS) != part else mark)
        rest = _strip(rest, IMAGE_WORDS)  # `image_masks`
        parts += [SPLIT_OF.get(re.sub(r"[-_ ]?(?:set|data|split)$", "", rest), rest)] if rest else []
    return mark is not None, tuple(parts)


def _strip(name: str, words: str) -> str:
    """A folder's name without a leading or trailing word of `words`."""
    found = re.match(rf"^(.*?)[-_ ]*(?:{words})$", name) or re.match(rf"^(?:{words})[-_ ]+(.*)$", name)
    return found.group(1) if found else name


def pair_by_name(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Find the mask of each image: of equal stem, without `_mask` and the like, or without `img_` or `_test` as well.

    Raises `UserError`, naming an image that has no mask, or two files that cannot be told apart.
    """
    found: dict[Path, Path] = {}
    for image_words, mask_words in (("", ""), ("(?!)", MASK_WORDS), ("|".join([IMAGE_WORDS, *SPLIT_OF]), MASK_WORDS)):
        left = _by_tokens([path for path in images if path not in found], image_words)
        taken = set(found.values())
        right = _by_tokens([path for path in masks if path not in taken], mask_words)
        for key in sorted(left.keys() & right.keys()):
            for files in (left[key], right[key]):
                if len(files) > 1:
                    raise UserError(f"{files[0]}: its name does not tell it from {files[1].name}: rename or remove one")
            found[left[key][0]] = right[key][0]
    if missing := [path for path in images if path not in found]:
        remedy = f"move it away, add its mask (all black: nothing there), or list pairs in {LIST}, see data/README.md"
        raise UserError(f"{missing[0]}: no mask for this image ({len(missing)} of {len(images)} have none): {remedy}")
    return {image: found[image] for image in images}


def _by_tokens(paths: list[Path], words: str) -> dict[tuple[str, ...], list[Path]]:
    """Files by their stems, or by the parts of them without `words`, which only say what kind of file it is."""
    groups = defaultdict(list)
    for path in paths:
        tokens = [unicodedata.normalize("NFC", path.stem)]
        if words:  # numbers stay (`mask01`: 01)
            tokens = [re.sub(rf"^(?:manual\d*$|(?:{words})(?=\d*$))", "", token) for token in _words(path)]
        groups[tuple(filter(None, tokens))].append(path)
    return groups


def _words(path: Path) -> list[str]:
    """The parts of a file's stem, in the Unicode form NFC: a Mac may write ü as u and two dots."""
    return re.split(r"(?<!ground)[-_.\s()]+|[-_.\s()]+(?!truth)", unicodedata.normalize("NFC", path.stem.lower()))


def groups_by_name(pairs: Sequence[Pair], pattern: str) -> list[str]:
    """The group of each image: what a list says, or what `data.group_pattern` finds in the stem of its name.

    Equal names in other folders are other groups, unless the pattern is the user's or there are copies, `0__hflip.png`.
    """
    groups = []
    for pair in pairs:
        try:
            groups.append(pair.group or re.match(pattern, pair.image.stem).group(1) or "")
        except (re.error, IndexError, AttributeError) as error:
            problem = f"data.group_pattern is {pattern}, but it must fit each name and hold one group in brackets"
            raise UserError(f"{pair.image}: {problem}") from error
    if pattern != DataConfig.group_pattern:
        return groups
    named = list(zip(pairs, groups, strict=True))
    copied = {group for pair, group in named if pair.group or group != pair.image.stem}
    return [g if g in copied else "/".join([*pair.folders, g]) for pair, g in named]


# ---- splits: groups are sorted before they are shuffled, so that only the seed decides, not the order of files
def split_by_group(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each picture, from the group of each, so that no group is on two sides.

    `shares` says which share of the groups (below 1; at least one if not 0), or how many (2 or more), goes to `val` and
    `test`; the rest goes to `train`. Raises `UserError` if nothing is left to train on.
    """
    if min(shares.values()) < 0 or sum(share for share in shares.values() if share < 1) >= 1:
        raise UserError(f"data.val_share and data.test_share must be at least 0, together below 1, not {dict(shares)}")
    order = np.random.default_rng(seed).permutation(sorted(set(groups))).tolist()
    counts = {name: int(share) or max(1, round(len(order) * share)) for name, share in shares.items() if share > 0}
    if len(order) <= sum(counts.values()):
        remedy = "add pictures, lower the shares, or let data.group_pattern make more groups"
        raise UserError(f"{len(order)} group(s) are too few for the splits train, {', '.join(counts)}: {remedy}")
    split_of = dict(zip(order, [name for name, count in counts.items() for _ in range(count)], strict=False))
    return [split_of.get(group, "train") for group in groups]


def k_folds(groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold (from 0) of each picture: groups are dealt out, the largest first, each to the fold that holds fewest.

    Raises `UserError` if there are fewer groups than folds, or fewer than two folds.
    """
    sizes = Counter(groups)
    if folds < 2 or len(sizes) < folds:
        raise UserError(f"data.folds is {folds}, but it must be 0 or from 2 to the number of groups, here {len(sizes)}")
    loads, fold_of = [0] * folds, {}
    order = np.random.default_rng(seed).permutation(sorted(sizes)).tolist()
    for group in sorted(order, key=lambda group: -sizes[group]):  # stable: equal sizes stay shuffled
        fold_of[group] = loads.index(min(loads))
        loads[fold_of[group]] += sizes[group]
    return [fold_of[group] for group in groups]


def assign_splits(groups: Sequence[str], brought: Sequence[str], config: DataConfig) -> list[str]:
    """The split of each picture, as its folder says (`brought`); val and test that no folder names are drawn.

    They are drawn from pictures of "" and `train`, with `config.split_seed`. With `config.folds`, one fold of train and
    val, thrown together, validates; test stays apart. `UserError` if groups are too few, or one would be on two sides.
    """
    splits = ["" if split == "train" or (split == "val" and config.folds) else split for split in brought]
    shares = {"val": 0.0 if config.folds else config.val_share, "test": config.test_share}
    shares = {split: 0.0 if split in brought else share for split, share in shares.items()}
    free = [group for group, split in zip(groups, splits, strict=True) if not split]
    drawn = iter(split_by_group(free, shares, config.split_seed) if free else [])
    splits = [split or next(drawn) for split in splits]
    if config.folds:
        pool = [group for group, split in zip(groups, splits, strict=True) if split == "train"]
        fold_of = iter(k_folds(pool, config.folds, config.split_seed))
        splits = ["val" if split == "train" and next(fold_of) == config.fold else split for split in splits]
    assert_disjoint(groups, splits)
    return splits


def assert_disjoint(groups: Sequence[str], splits: Sequence[str | int]) -> None:
    """Prove that no group is on two sides; raise `UserError`, naming the first that is."""
    sides = {}
    for group, split in zip(groups, splits, strict=True):
        if (other := sides.setdefault(group, split)) != split:
            remedy = "put it on one side, or correct data.group_pattern"
            raise UserError(f"group '{group}' is on two sides, {other} and {split}: {remedy}")
