import math
import random
from itertools import product

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_confusion_matrix_metric

from unet_helpers import scores
from unet_helpers.config import UserError
from unet_helpers.scores import (
    SCORES,
    accuracy,
    bootstrap_interval,
    cldice,
    defined_mean,
    dice,
    iou,
    paired_difference,
    sensitivity,
    undefined,
)

ALL_COUNTS = st.tuples(*[st.integers(0, 10**10)] * 4)
MONAI_NAMES = {
    "iou": "threat score",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "mcc": "matthews correlation coefficient",
    "dice": "f1 score",
}


def test_hand_computed():
    values = scores.scores([6, 2, 3, 9])
    assert values == pytest.approx(
        {
            "dice": 12 / 17,
            "iou": 6 / 11,
            "accuracy": 15 / 20,
            "sensitivity": 6 / 9,
            "specificity": 9 / 11,
            "precision": 6 / 8,
            "mcc": (54 - 6) / math.sqrt(8 * 9 * 11 * 12),
        }
    )
    assert list(values) == list(SCORES)
    assert all(type(value) is float for value in values.values())


def test_equal_to_scikit_learn_and_torchmetrics_and_monai():
    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9):
        truth, predicted = rng.random(500) < share, rng.random(500) < 0.4
        tn, fp, fn, tp = sklearn.metrics.confusion_matrix(truth, predicted).ravel()
        ours = scores.scores([tp, fp, fn, tn])
        assert ours["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, predicted))
        assert ours["iou"] == pytest.approx(sklearn.metrics.jaccard_score(truth, predicted))
        assert ours["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
        assert ours["sensitivity"] == pytest.approx(sklearn.metrics.recall_score(truth, predicted))
        assert ours["specificity"] == pytest.approx(sklearn.metrics.recall_score(~truth, ~predicted))
        assert ours["precision"] == pytest.approx(sklearn.metrics.precision_score(truth, predicted))
        assert ours["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, predicted))
        t, p = torch.from_numpy(truth).long(), torch.from_numpy(predicted).long()
        assert ours["dice"] == pytest.approx(tm.binary_f1_score(p, t).item())
        assert ours["iou"] == pytest.approx(tm.binary_jaccard_index(p, t).item())
        assert ours["specificity"] == pytest.approx(tm.binary_specificity(p, t).item())
        assert ours["mcc"] == pytest.approx(tm.binary_matthews_corrcoef(p, t).item(), abs=1e-6)
        confusion = torch.tensor([[[tp, fp, tn, fn]]], dtype=torch.float64)  # MONAI's order
        for name, theirs in MONAI_NAMES.items():
            assert ours[name] == pytest.approx(compute_confusion_matrix_metric(theirs, confusion).item()), name


@given(ALL_COUNTS)
def test_every_score_is_in_its_range_or_nan(counts):
    for name, value in scores.scores(counts).items():
        assert math.isnan(value) or (-1 if name == "mcc" else 0) <= value <= 1


@given(ALL_COUNTS)
def test_dice_and_iou_are_one_number_in_two_guises(counts):
    np.testing.assert_allclose(dice(counts), 2 * iou(counts) / (1 + iou(counts)), rtol=1e-12)


@given(ALL_COUNTS)
def test_exchanging_prediction_and_truth(counts):
    tp, fp, fn, tn = counts
    a, b = scores.scores(counts), scores.scores([tp, fn, fp, tn])
    for name, partner in {"dice": "dice", "iou": "iou", "mcc": "mcc", "precision": "sensitivity"}.items():
        np.testing.assert_allclose(a[name], b[partner], rtol=1e-9, atol=1e-12)
    c = scores.scores([tn, fn, fp, tp])  # background as the class of interest
    np.testing.assert_allclose(a["mcc"], c["mcc"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(a["sensitivity"], c["specificity"])


def test_ten_billion_pixels_do_not_overflow():
    values = scores.scores(np.array([10**10, 10**10, 10**10, 10**10]))
    assert values["mcc"] == 0
    assert values["dice"] == 0.5
    assert scores.mcc([10**10, 1, 1, 10**10]) == pytest.approx(1, abs=1e-9)


def test_empty_truth():
    false_alarm, silence = scores.scores([0, 5, 0, 95]), scores.scores([0, 0, 0, 100])
    assert false_alarm["dice"] == false_alarm["iou"] == false_alarm["precision"] == 0
    assert false_alarm["accuracy"] == 0.95
    assert set(undefined(false_alarm)) == {"sensitivity", "mcc"}
    assert set(undefined(silence)) == {"dice", "iou", "sensitivity", "precision", "mcc"}
    assert undefined(silence)["dice"] == "no positive pixels in the ground truth or the prediction"
    assert silence["specificity"] == silence["accuracy"] == 1


def test_other_undefined_cases():
    assert set(undefined(scores.scores([0, 0, 5, 95]))) == {"precision", "mcc"}  # nothing found
    assert scores.scores([0, 0, 5, 95])["dice"] == 0
    assert set(undefined(scores.scores([7, 0, 0, 0]))) == {"specificity", "mcc"}  # foreground only, all found
    assert set(undefined(scores.scores([0, 0, 0, 0]))) == set(SCORES)
    assert undefined({"dice": 0.5, "per_class": {}, "cldice": math.nan}) == {"cldice": scores.REASONS["cldice"]}
    assert set(SCORES) | {"roc_auc", "pr_auc", "cldice"} == set(scores.REASONS)


@pytest.mark.filterwarnings("error")
def test_arrays_of_counts_give_arrays_of_scores_without_warnings():
    counts = np.array([[[6, 2, 3, 9], [0, 0, 0, 20]], [[1, 0, 0, 0], [0, 1, 1, 0]]])
    np.testing.assert_allclose(dice(counts), [[12 / 17, np.nan], [1, 0]])
    for score in SCORES.values():
        assert score(counts).shape == (2, 2)
        np.testing.assert_array_equal(score(counts)[1, 0], score([1, 0, 0, 0]))


@pytest.mark.filterwarnings("error")
def test_mean_of_what_is_defined():
    np.testing.assert_array_equal(defined_mean([[0.5, math.nan, 1.0], [math.nan] * 3]), [0.75, math.nan])
    assert defined_mean([0.25]) == 0.25
    assert math.isnan(defined_mean([]))


@pytest.mark.filterwarnings("error")
def test_cldice_from_counts():
    assert cldice([3, 4, 5, 10]) == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert cldice([4, 4, 10, 10]) == 1
    assert cldice([0, 4, 0, 10]) == 0  # both there, apart from each other
    assert cldice([0, 0, 0, 10]) == 0  # nothing found
    assert cldice([0, 4, 0, 0]) == 0  # nothing there
    assert math.isnan(cldice([0, 0, 0, 0]))
    np.testing.assert_array_equal(cldice([[4, 4, 10, 10], [0, 0, 0, 0]]), [1, math.nan])


def counts_of(images=20, seed=0, quality=0.8):
    """tp, fp, fn, tn of images that differ in difficulty and in how much there is to be found."""
    rng = np.random.default_rng(seed)
    positive = rng.integers(500, 3000, images)
    tp = rng.binomial(positive, np.clip(quality + 0.05 * rng.standard_normal(images), 0, 1))
    fp = rng.binomial(10_000 - positive, 0.02)
    return np.stack([tp, fp, positive - tp, 10_000 - positive - fp], -1)


def test_equal_to_drawing_images_by_hand():
    counts, draw = counts_of(), random.Random(1)
    draws = [dice(sum(draw.choices(list(counts), k=20))) for _ in range(20_000)]
    expected = np.quantile(draws, [0.025, 0.975])
    low, high = bootstrap_interval(counts, dice, samples=20_000)
    width = high - low
    assert low == pytest.approx(expected[0], abs=0.03 * width)
    assert high == pytest.approx(expected[1], abs=0.03 * width)
    assert low < dice(counts.sum(0)) < high


@pytest.mark.parametrize(("images", "covered"), [(4, 0.78), (20, 0.91)])
def test_an_interval_of_few_images_is_as_narrow_as_its_docstring_says(images, covered):
    """Eyes of unequal difficulty: how often a 95% interval holds the score of all eyes there might be."""
    rng, repeats = np.random.default_rng(images), 600

    def draw(count: int) -> np.ndarray:
        hits = (1000 * rng.beta(16, 4, count)).round()
        return np.stack([hits, 0 * hits + 200, 1000 - hits, 0 * hits + 8000], -1)

    truth, held = dice(draw(200_000).sum(0)), 0
    for _ in range(repeats):
        low, high = bootstrap_interval(draw(images), dice, samples=500)
        held += low <= truth <= high
    assert held / repeats == pytest.approx(covered, abs=3 * math.sqrt(covered * (1 - covered) / repeats))


def test_pools_before_it_divides():
    counts = np.array([[1000, 0, 0, 0], [0, 1, 1, 0]])  # pooled Dice of one each .999, mean per image .5
    draws = [dice(counts[list(pair)].sum(0)) for pair in product([0, 1], repeat=2)]
    low, high = bootstrap_interval(counts, dice, level=0.3)  # the middle of 0, .999, .999, 1
    assert low == high == sorted(draws)[1] == 1000 / 1001


def test_same_seed_same_interval_and_level_widens_it():
    counts = counts_of()
    first = bootstrap_interval(counts, dice)
    assert first == bootstrap_interval(counts.tolist(), dice)
    assert first != bootstrap_interval(counts, dice, seed=1)
    wide, narrow = bootstrap_interval(counts, dice, level=0.99), bootstrap_interval(counts, dice, level=0.5)
    assert wide[0] < first[0] < narrow[0] < narrow[1] < first[1] < wide[1]
    assert all(type(end) is float for end in first)


def test_many_images_are_drawn_in_several_goes():
    counts = np.tile(counts_of(20), (1500, 1))  # 30,000 images
    low, high = bootstrap_interval(counts, dice, samples=300)
    assert 0 < high - low < 0.01


@pytest.mark.filterwarnings("error")
def test_one_image_has_no_interval():
    assert all(math.isnan(end) for end in bootstrap_interval([[5, 1, 1, 5]], dice))
    result = paired_difference([[5, 1, 1, 5]], [[5, 2, 1, 5]], dice)
    assert result["difference"] == pytest.approx(10 / 12 - 10 / 13)
    assert math.isnan(result["low"])
    assert result["better"] is False


@pytest.mark.filterwarnings("error")
def test_draws_without_positives_are_left_out():
    counts = np.array([[8, 1, 2, 89], [0, 0, 0, 100], [0, 0, 0, 100]])
    low, high = bootstrap_interval(counts, sensitivity)
    assert low == high == 0.8
    assert all(math.isnan(end) for end in bootstrap_interval(counts[1:], sensitivity))


def test_a_run_that_finds_nothing_where_nothing_is_counts_for_nothing():
    """By hand: the first run's score is undefined in every draw, the second's is one half."""
    assert bootstrap_interval([[[0, 0, 0, 10]] * 2, [[1, 1, 1, 7]] * 2], dice) == (0.5, 0.5)


def test_paired_interval_is_narrower_than_either_models_own():
    hard = np.random.default_rng(0).integers(0, 500, 20)
    a = np.stack([900 - hard, 100 + 0 * hard, 100 + hard, 9000 + 0 * hard], -1)
    b = np.add(a, [-10, 0, 10, 0])  # always a little worse
    result, alone = paired_difference(a, b, dice), bootstrap_interval(a, dice)
    assert result["difference"] == pytest.approx(dice(a.sum(0)) - dice(b.sum(0)))
    assert 0 < result["low"] < result["difference"] < result["high"]
    assert result["better"] is True
    assert result["high"] - result["low"] < 0.1 * (alone[1] - alone[0])
    back = paired_difference(b, a, dice)
    assert (back["low"], back["high"]) == pytest.approx((-result["high"], -result["low"]))
    assert back["better"] is False


@pytest.mark.parametrize(("seeds", "images"), [(1, 4), (1, 8), (1, 20), (3, 20), (5, 20), (20, 4)])
def test_an_interval_of_a_difference_misses_zero_in_one_of_twenty_nulls(seeds, images):
    """Both are equally good on average: by luck of the images, and with several seeds of the seeds (hits of 1,000)."""
    rng, missed, repeats = np.random.default_rng(seeds), 0, 400
    for _ in range(repeats):
        luck = rng.normal(0, 12, (1, images)) if seeds == 1 or images == 4 else rng.normal(0, 12, (seeds, 1))
        hits = (800 + luck + rng.normal(0, 2, (seeds, images))).round()
        a, b = (np.stack([x, 0 * x + 100, 1000 - x, 0 * x + 9000], -1) for x in (hits, 0 * hits + 800))
        result = paired_difference(a, b, dice, samples=400)
        assert result["better"] == (result["low"] > 0)
        missed += not result["low"] <= 0 <= result["high"]
    assert missed <= 0.05 * repeats + 3 * math.sqrt(0.05 * 0.95 * repeats)  # three standard deviations


def test_a_model_is_not_better_than_itself():
    result = paired_difference(counts_of(), counts_of(), dice)
    assert result == {"difference": 0.0, "low": 0.0, "high": 0.0, "better": False}


def test_noise_that_differs_from_image_to_image_is_not_better():
    result = paired_difference(counts_of(seed=1), counts_of(seed=1)[:, [0, 2, 1, 3]][::-1], accuracy)
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["low"] < 0 < result["high"]
    assert result["better"] is False


def test_seeds_are_drawn_as_well_as_images():
    rng = np.random.default_rng(0)
    shift = rng.integers(-60, 60, (6, 1))  # a run is good or bad on all images
    hits = 800 + shift + rng.integers(-5, 5, (6, 20))
    runs = np.stack([hits, 0 * hits + 100, 1000 - hits, 0 * hits + 9000], -1)
    spread = dice(runs.sum(1)).std()
    low, high = bootstrap_interval(runs, dice)
    assert high - low == pytest.approx(2 * 1.96 * spread / math.sqrt(6), rel=0.2)
    one = bootstrap_interval(runs[:1], dice)
    assert one == bootstrap_interval(runs[0], dice)
    assert one[1] - one[0] < 0.2 * (high - low)


def test_seed_pairs_stay_together():
    rng = np.random.default_rng(0)
    hits = 800 + rng.integers(-60, 60, (5, 1)) + np.zeros((1, 20), int)
    a = np.stack([hits, 0 * hits, 1000 - hits, 0 * hits], -1)
    b = np.add(a, [-1, 0, 1, 0])
    assert paired_difference(a, b, dice)["better"]
    assert not paired_difference(a, np.roll(b, 1, axis=0), dice)["better"]


def test_difference_over_seeds_is_the_mean_of_their_pooled_scores():
    a, b = (np.stack([counts_of(seed=s, quality=q) for s in range(3)]) for q in (0.85, 0.8))
    result = paired_difference(a, b, dice)
    assert result["difference"] == pytest.approx(
        np.mean([dice(x.sum(0)) - dice(y.sum(0)) for x, y in zip(a, b, strict=True)])
    )


def test_several_classes():
    a = np.stack([counts_of(seed=s) for s in range(3)], axis=1)[None]  # (1, N, K, 4)

    def mean_dice(counts):
        return defined_mean(dice(counts))

    low, high = bootstrap_interval(a, mean_dice)
    assert low < mean_dice(a[0].sum(0)) < high
    assert paired_difference(a, a, mean_dice)["difference"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(np.zeros((0, 4)), dice), r"shape \(1, 0, 4\), expected"),
        (lambda: bootstrap_interval(np.zeros((5, 3)), dice), "tp, fp, fn, tn of each"),
        (lambda: bootstrap_interval(np.zeros(4), dice), "expected"),
        (lambda: bootstrap_interval(counts_of(), dice, samples=0), "samples is 0"),
        (lambda: bootstrap_interval(counts_of(), dice, level=95), "level is 95"),
        (lambda: paired_difference(counts_of(3), counts_of(4), dice), r"\(3, 4\) and \(4, 4\)"),
    ],
)
def test_wrong_input_ends_in_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
