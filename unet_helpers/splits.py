"""Who goes to training, validation and test: whole groups, never single pictures.

A group is whatever must not be torn apart: one eye with all its augmented copies, one car with its sixteen views, one
film sequence. A split by picture would put near-copies of the training images into the test set, and the score would
measure memory. The groups are sorted before they are drawn, so neither the order of the files in a folder nor the
machine changes a split; only the seed does.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unet_helpers.config import DataConfig, UserError

SPLITS = ("train", "val", "test")


def _shuffled(groups: Sequence[str], seed: int) -> list[str]:
    """The distinct groups in an order that depends on the seed alone."""
    distinct = sorted(set(groups))
    return [distinct[position] for position in np.random.default_rng(seed).permutation(len(distinct))]


def split_by_group(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """Share out pictures among splits so that each group lies on one side only.

    Args:
        groups: the group of each picture.
        shares: the share of the groups (0 to 1) that goes to `val` and `test`; the rest goes to `train`. A share above
            0 gets at least one group.
        seed: of the shuffle.

    Returns:
        The split of each picture, in the order of `groups`.

    Raises:
        UserError: if there are fewer groups than splits, or the shares leave nothing to train on.
    """
    if any(share < 0 for share in shares.values()) or not sum(shares.values()) < 1:
        raise UserError(f"data.val_share and data.test_share must be at least 0, together below 1, not {dict(shares)}")
    order = _shuffled(groups, seed)
    counts = {name: max(1, round(len(order) * share)) for name, share in shares.items() if share > 0}
    if len(order) <= sum(counts.values()):
        raise UserError(
            f"{len(order)} group(s) of pictures are too few for the splits train, {', '.join(counts)}: add pictures, "
            "lower the shares, or let data.group_pattern make more groups"
        )
    names = [name for name, count in counts.items() for _ in range(count)]
    split_of = dict(zip(order, names + ["train"] * (len(order) - len(names)), strict=True))
    return [split_of[group] for group in groups]


def k_folds(groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """Deal the groups out into `folds` folds of almost equal size: the fold (from 0) of each picture.

    A group counts by its number of pictures, and the largest is dealt first, each to the fold that holds fewest.
    Raises `UserError` if there are fewer groups than folds, or fewer than two folds.
    """
    sizes = Counter(groups)
    if folds < 2 or len(sizes) < folds:
        raise UserError(f"data.folds is {folds}, but it must be 0 or from 2 to the number of groups, here {len(sizes)}")
    loads, fold_of = [0] * folds, {}
    for group in sorted(_shuffled(groups, seed), key=lambda group: -sizes[group]):  # stable: equal sizes stay shuffled
        fold_of[group] = loads.index(min(loads))
        loads[fold_of[group]] += sizes[group]
    return [fold_of[group] for group in groups]


def assign_splits(groups: Sequence[str], brought: Sequence[str], config: DataConfig) -> list[str]:
    """Keep the splits that a data set brings along, and draw those it lacks from the rest of its pictures.

    Args:
        groups: the group of each picture.
        brought: the split that its folder names, or "".
        config: `val_share`, `test_share`, `folds`, `fold` and `split_seed` count. With `folds`, training and validation
            pictures are thrown together and one fold of them validates; test pictures never are.

    Returns:
        The split of each picture; no group is on two sides, or `UserError` is raised.
    """
    splits = ["" if split == "train" or (split == "val" and config.folds) else split for split in brought]
    shares = {
        "val": 0.0 if "val" in brought or config.folds else config.val_share,
        "test": 0.0 if "test" in brought else config.test_share,
    }
    open_places = [place for place, split in enumerate(splits) if not split]
    drawn = split_by_group([groups[place] for place in open_places], shares, config.split_seed) if open_places else []
    for place, split in zip(open_places, drawn, strict=True):
        splits[place] = split
    if config.folds:
        places = [place for place, split in enumerate(splits) if split == "train"]
        folds = k_folds([groups[place] for place in places], config.folds, config.split_seed)
        for place, fold in zip(places, folds, strict=True):
            splits[place] = "val" if fold == config.fold else "train"
    assert_disjoint(groups, splits)
    return splits


def assert_disjoint(groups: Sequence[str], splits: Sequence[str | int]) -> None:
    """Prove that no group is on two sides; raise `UserError`, naming the first that is."""
    sides: dict[str, str | int] = {}
    for group, split in zip(groups, splits, strict=True):
        if sides.setdefault(group, split) != split:
            raise UserError(
                f"group '{group}' is on two sides, {sides[group]} and {split}, so the score would be too good: "
                "put all its pictures on one side, or correct data.group_pattern"
            )
