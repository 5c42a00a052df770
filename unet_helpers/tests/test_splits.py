import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_helpers.config import DataConfig, UserError
from unet_helpers.splits import assert_disjoint, assign_splits, k_folds, split_by_group

CARS = [f"car{number:02d}" for number in range(20) for _ in range(4)]
SHARES = {"val": 0.2, "test": 0.1}
group_lists = st.lists(st.sampled_from([f"g{number}" for number in range(30)]), min_size=40, max_size=120).filter(
    lambda groups: len(set(groups)) >= 5
)


@settings(max_examples=50, deadline=None)
@given(groups=group_lists, seed=st.integers(0, 1000), shuffle=st.randoms())
def test_no_group_is_on_two_sides_in_any_order_of_the_files(groups, seed, shuffle):
    order = list(range(len(groups)))
    shuffle.shuffle(order)
    for draw in (lambda names: split_by_group(names, SHARES, seed), lambda names: k_folds(names, 4, seed)):
        sides = draw(groups)
        assert all(len({side for g, side in zip(groups, sides, strict=True) if g == group}) == 1 for group in groups)
        assert_disjoint(groups, sides)
        assert draw([groups[place] for place in order]) == [sides[place] for place in order]


def test_shares_are_shares_of_the_groups_and_the_seed_matters():
    splits = split_by_group(CARS, SHARES, 0)
    assert [splits.count(name) for name in ("train", "val", "test")] == [56, 16, 8]
    assert splits == split_by_group(CARS, SHARES, 0)
    assert splits != split_by_group(CARS, SHARES, 1)


def test_the_split_of_a_seed_is_the_same_on_every_machine():
    groups = [f"{number}_training" for number in range(21, 41)]
    splits = split_by_group(groups, {"val": 0.2, "test": 0.0}, 0)
    assert [group[:2] for group, split in zip(groups, splits, strict=True) if split == "val"] == [
        "23",
        "25",
        "27",
        "40",
    ]


def test_folds_are_even_and_each_group_validates_once():
    folds = k_folds(CARS, 5, 0)
    assert [folds.count(fold) for fold in range(5)] == [16] * 5
    assert k_folds(CARS, 5, 1) != folds


def test_too_few_groups_and_senseless_shares():
    for draw in (
        lambda: split_by_group(["a", "a", "b"], SHARES, 0),
        lambda: split_by_group(CARS, {"val": 0.6, "test": 0.4}, 0),
        lambda: split_by_group(CARS, {"val": -0.1, "test": 0.4}, 0),
        lambda: k_folds(["a", "b"], 3, 0),
        lambda: k_folds(["a", "b"], 1, 0),
    ):
        with pytest.raises(UserError):
            draw()


def test_a_leak_is_named():
    with pytest.raises(UserError, match=r"car7.*train.*test"):
        assert_disjoint(["car7", "car8", "car7"], ["train", "train", "test"])


def test_splits_that_the_data_brings_are_kept_and_the_others_drawn():
    config = DataConfig(val_share=0.25, test_share=0.25)
    groups = [f"g{number}" for number in range(12)]
    assert assign_splits(groups, ["train"] * 4 + ["val"] * 4 + ["test"] * 4, config) == (
        ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    )
    splits = assign_splits(groups, ["train"] * 8 + ["test"] * 4, config)
    assert splits[8:] == ["test"] * 4
    assert (splits.count("train"), splits.count("val")) == (6, 2)
    splits = assign_splits(groups, [""] * 12, config)
    assert [splits.count(name) for name in ("train", "val", "test")] == [6, 3, 3]


def test_folds_pool_training_and_validation_but_never_touch_the_test():
    groups = [f"g{number}" for number in range(12)]
    validating = []
    for fold in range(4):
        splits = assign_splits(groups, ["train"] * 6 + ["val"] * 2 + ["test"] * 4, DataConfig(folds=4, fold=fold))
        assert splits[8:] == ["test"] * 4
        validating += [group for group, split in zip(groups, splits, strict=True) if split == "val"]
    assert sorted(validating) == sorted(groups[:8])


def test_a_group_in_two_folders_is_refused():
    with pytest.raises(UserError, match="'a'"):
        assign_splits(["a", "b", "c", "a"], ["train", "train", "val", "test"], DataConfig())
