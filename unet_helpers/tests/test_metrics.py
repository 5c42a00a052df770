import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice
from PIL import Image

from unet_helpers.config import IGNORE, UserError
from unet_helpers.metrics import (
    BinaryHistogram,
    ConfusionMatrix,
    class_mean,
    cldice_counts,
    foreground,
    image_counts,
    level,
    probabilities,
    quantise,
)
from unet_helpers.scores import SCORES, cldice, dice, iou, undefined


def example(seed=0, batch=3, height=31, width=45, num_classes=1, ignored=0.3):
    rng = np.random.default_rng(seed)
    target = rng.integers(max(num_classes, 2), size=(batch, height, width))
    probability = np.clip(0.5 + 0.1 * (target == 1) + 0.2 * rng.standard_normal(target.shape), 0, 1).astype(np.float32)
    target[rng.random(target.shape) < ignored] = IGNORE
    return torch.from_numpy(probability), torch.from_numpy(target)


def filled(probability, target):
    histogram = BinaryHistogram()
    histogram.update(probability, target)
    return histogram


def histogram_of(probability, target):
    return filled(torch.tensor([[probability]], dtype=torch.float32), torch.tensor([[target]]))


# --- sixteen bits and the threshold


def test_what_is_written_to_a_png_comes_back_as_the_same_number(tmp_path):
    probability, _ = example()
    Image.fromarray(quantise(probability[0]).numpy().astype(np.uint16)).save(tmp_path / "p.png")
    back = np.array(Image.open(tmp_path / "p.png")).astype(np.float32) / 65535
    assert torch.equal(quantise(back), quantise(probability[0]))
    everything = torch.arange(65536)
    assert torch.equal(quantise(everything / 65535), everything)
    assert quantise(torch.tensor([0.0, 0.5 / 65535 + 1e-9, 0.5, 1.0])).tolist() == [0, 1, 32768, 65535]


@pytest.mark.parametrize("denominator", [100, 10_000, 65535])
def test_threshold_is_compared_with_the_sixteen_bit_value_exactly(denominator):
    for numerator in range(denominator + 1):
        first = level(numerator / denominator)
        assert first * denominator >= numerator * 65535  # in whole numbers: first / 65535 >= threshold
        assert (first - 1) * denominator < numerator * 65535


def test_a_pixel_on_the_threshold_is_foreground():
    assert foreground(torch.tensor([0.0, 0.2, 0.2 - 2e-5, 1.0]), 0.2).tolist() == [False, True, False, True]
    assert foreground(torch.tensor([0.0, 1.0]), 0).all()
    assert foreground(torch.tensor([0.99999, 1.0]), 1).tolist() == [False, True]


def test_probabilities_are_sigmoid_or_softmax_in_float32():
    logits = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(probabilities(logits), logits.exp() / logits.exp().sum(1, keepdim=True))
    one = probabilities(logits[:, :1].bfloat16())
    assert one.shape == (2, 5, 7)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, 1 / (1 + torch.exp(-logits[:, 0].bfloat16().float())))


# --- histogram


def test_counts_by_hand_with_ignored_pixels():
    histogram = histogram_of([0.9, 0.8, 0.3, 0.6, 0.1, 0.9, 0.1], [1, 1, 1, 0, 0, IGNORE, IGNORE])
    assert histogram.counts(0.5).tolist() == [2, 1, 1, 1]
    assert histogram.counts(0).tolist() == [3, 2, 0, 0]
    assert histogram.counts(1).tolist() == [0, 0, 3, 2]
    values = histogram.scores(0.5)
    assert (values["correct"], values["total"]) == (3, 5)
    assert values["accuracy"] == 3 / 5
    assert values["dice"] == 4 / 6
    assert values["roc_auc"] == pytest.approx(5 / 6)  # of the six pairs .3 < .6 is the wrong one
    assert values["pr_auc"] == pytest.approx((1 + 1 + 3 / 4) / 3)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_areas_equal_scikit_learn_and_torchmetrics(ties, seed):
    probability, target = example(seed)
    if ties:
        probability = (probability * 7).round() / 7
    probability = quantise(probability) / 65535
    histogram, valid = filled(probability, target), target != IGNORE
    y, p = target[valid].numpy(), probability[valid].numpy()
    assert histogram.roc_auc() == pytest.approx(sklearn.metrics.roc_auc_score(y, p), abs=1e-12)
    assert histogram.pr_auc() == pytest.approx(sklearn.metrics.average_precision_score(y, p), abs=1e-12)
    assert histogram.roc_auc() == pytest.approx(
        tm.binary_auroc(probability, target, ignore_index=IGNORE).item(), abs=1e-5
    )
    theirs = tm.binary_average_precision(probability, target, ignore_index=IGNORE).item()
    assert histogram.pr_auc() == pytest.approx(theirs, abs=1e-5)


def test_scores_at_a_threshold_equal_scikit_learn():
    probability, target = example(4)
    values, valid = filled(probability, target).scores(0.37), target != IGNORE
    y, p = target[valid].numpy(), probability[valid].numpy() >= 0.37
    assert values["dice"] == pytest.approx(sklearn.metrics.f1_score(y, p))
    assert values["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(y, p))
    assert values["total"] == len(y)
    assert values["correct"] == (y == p).sum()


def test_area_of_a_billion_pixels_does_not_overflow():
    histogram = histogram_of([0.2, 0.7, 0.7, 0.9], [0, 0, 1, 1])
    expected = histogram.roc_auc(), histogram.pr_auc()
    histogram.table *= 10**10
    assert (histogram.roc_auc(), histogram.pr_auc()) == pytest.approx(expected, rel=1e-12)
    assert histogram.counts(0.5).tolist() == [2 * 10**10, 10**10, 0, 10**10]


@pytest.mark.parametrize(
    ("target", "nan"),
    [
        ([0, 0, 0], {"roc_auc", "pr_auc", "sensitivity", "mcc"}),
        ([1, 1, 1], {"roc_auc", "specificity", "mcc"}),
        ([IGNORE] * 3, {"roc_auc", "pr_auc", *SCORES}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_one_class_or_nothing_at_all(target, nan):
    histogram = histogram_of([0.2, 0.6, 0.7], target)
    assert set(undefined(histogram.scores(0.5))) == nan
    assert 0 < histogram.best_threshold() < 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(1, 4))
def test_order_and_size_of_batches_and_adding_up_do_not_matter(seed, order, cut):
    probability, target = example(seed, batch=5, height=4, width=3)
    whole = filled(probability, target)
    probability, target = probability[order], target[order]
    a, b = filled(probability[:cut], target[:cut]), filled(probability[cut:], target[cut:])
    a.table = a.table + b.table
    assert torch.equal(a.table, whole.table)
    assert whole.table.sum() == (target != IGNORE).sum()


@pytest.mark.parametrize("seed", range(3))
def test_best_threshold_is_the_best_of_all_by_brute_force(seed):
    probability, target = example(seed, batch=1, height=9, width=11)
    best = filled(probability, target).best_threshold()
    levels, truth = (probability[target != IGNORE] * 65535).round().long().numpy(), target[target != IGNORE].numpy()
    said = 10_000 * levels >= 65535 * np.arange(1, 10_000)[:, None]  # in whole numbers
    all_dice = 2 * (said & (truth == 1)).sum(1) / (said.sum(1) + truth.sum())
    index = round(best * 10_000) - 1
    assert best == round(best, 4)
    assert all_dice[index] == all_dice.max()
    run = np.flatnonzero(all_dice == all_dice.max())
    run = run[: np.argmax(np.diff(run, append=10**6) > 1) + 1]  # the first one
    assert index == (run[0] + run[-1]) // 2


def test_best_threshold_lies_in_the_middle_of_what_is_equally_good():
    assert histogram_of([0.2, 0.2, 0.6, 0.6], [0, 0, 1, 1]).best_threshold() == pytest.approx(0.4, abs=1e-4)
    assert histogram_of([0.2, 0.6], [0, 0]).best_threshold() == 0.5
    assert histogram_of([0.0, 0.0], [0, 1]).best_threshold() == 0.5


# --- several classes


def confusion(predicted, target, num_classes):
    matrix = ConfusionMatrix(num_classes)
    matrix.update(predicted, target)
    return matrix


def test_confusion_matrix_by_hand():
    matrix = confusion(torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([[0, 1, 0, IGNORE, 1]]), 3)
    assert matrix.table.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert matrix.counts().tolist() == [[1, 0, 1, 2], [2, 1, 0, 1], [0, 0, 0, 4]]
    values = matrix.scores()
    assert (values["correct"], values["total"], values["accuracy"]) == (3, 4, 0.75)
    np.testing.assert_allclose(values["per_class"]["dice"], [2 / 3, 4 / 5, math.nan])
    assert values["dice"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # class 2 is nowhere: left out


def test_several_classes_equal_scikit_learn_and_torchmetrics():
    _, target = example(num_classes=5)
    predicted = torch.where(torch.rand(target.shape) < 0.6, target % 5, torch.randint(5, target.shape))
    matrix, valid = confusion(predicted, target, 5), target != IGNORE
    values, y, p = matrix.scores(), target[valid].numpy(), predicted[valid].numpy()
    np.testing.assert_array_equal(matrix.table, sklearn.metrics.confusion_matrix(y, p))
    np.testing.assert_allclose(values["per_class"]["iou"], sklearn.metrics.jaccard_score(y, p, average=None))
    assert values["dice"] == pytest.approx(sklearn.metrics.f1_score(y, p, average="macro"))
    assert values["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(y, p))
    assert values["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, p))
    theirs = tm.multiclass_jaccard_index(predicted, target, 5, ignore_index=IGNORE).item()
    assert values["iou"] == pytest.approx(theirs, abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_confusion_matrix_of_one_class_or_nothing():
    zeros = torch.zeros(1, 2, 2, dtype=torch.int64)
    one = confusion(zeros, zeros, 3).scores()
    assert (one["dice"], one["accuracy"]) == (1, 1)
    assert math.isnan(one["mcc"])
    nothing = confusion(zeros, zeros + IGNORE, 3).scores()
    assert nothing["total"] == 0
    assert set(undefined(nothing)) == set(SCORES)


def test_two_classes_and_binary_agree():
    probability, target = example(7)
    matrix = confusion(foreground(probability, 0.5).long(), target, 2)
    assert matrix.counts()[1].tolist() == filled(probability, target).counts(0.5).tolist()


# --- per image


def test_image_counts_equal_monai_and_add_up():
    probability, target = example(2)
    target[1][target[1] == 1] = 0  # an image without foreground
    predicted = foreground(probability, 0.6)
    counts = image_counts(predicted, target)
    assert counts.shape == (3, 4)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts.sum(0), filled(probability, target).counts(0.6))
    keep = target != IGNORE
    theirs = compute_dice(
        (predicted & keep)[:, None].float(), ((target == 1) & keep)[:, None].float(), ignore_empty=False
    )
    np.testing.assert_allclose(dice(counts), theirs[:, 0].numpy(), rtol=1e-6)


def test_image_counts_of_several_classes_add_up_to_the_confusion_matrix():
    _, target = example(num_classes=4)
    predicted = torch.randint(4, target.shape)
    counts = image_counts(predicted, target, 4)
    assert counts.shape == (3, 4, 4)
    np.testing.assert_array_equal(counts.sum(0), confusion(predicted, target, 4).counts())
    np.testing.assert_array_equal(counts.sum(2), (target != IGNORE).sum((1, 2))[:, None].expand(3, 4))


# --- centre lines


def test_cldice_of_drawn_vessels():
    truth = np.zeros((30, 60), int)
    truth[13:18, :] = 1  # a vessel of width 5
    thin, half = np.zeros_like(truth), np.zeros_like(truth)
    thin[15] = 1
    half[13:18, :30] = 1
    assert cldice(cldice_counts(truth, truth)) == 1
    assert cldice_counts(thin, truth).tolist()[:2] == [60, 60]
    p_in_y, p, y_in_p, y = cldice_counts(half, truth)
    assert p_in_y == p
    assert y_in_p / y == pytest.approx(0.5, abs=0.05)
    assert cldice(cldice_counts(half, truth)) == pytest.approx(2 / 3, abs=0.04)
    assert cldice(cldice_counts(np.roll(truth, 8, 0), truth)) == 0
    assert cldice(cldice_counts(np.zeros_like(truth), truth)) == 0
    assert math.isnan(cldice(cldice_counts(np.zeros_like(truth), 0 * truth)))


def test_cldice_of_a_one_pixel_line_by_hand():
    truth = torch.zeros(9, 12, dtype=torch.int64)
    truth[4] = 1
    predicted = torch.zeros(9, 12, dtype=torch.bool)
    predicted[4, :6] = True  # 6 of 12 found
    predicted[0, :2] = True  # 2 of 8 wrong
    counts = cldice_counts(predicted, truth)
    assert counts.tolist() == [6, 8, 6, 12]
    assert cldice(counts) == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_cldice_is_for_thin_objects():
    truth = np.zeros((400, 500), np.uint8)
    truth[100:228] = 1  # its middle is 64 pixels from both sides
    assert cldice(cldice_counts(truth, truth)) == 1
    truth[228] = truth[229] = 1
    assert np.isnan(cldice_counts(truth, truth)).all()


def test_cldice_ignores_255():
    truth = np.zeros((9, 12), int)
    truth[4, :8] = 1
    truth[:, 8:] = IGNORE
    predicted = np.zeros((9, 12), bool)
    predicted[4] = predicted[0, 9:] = True
    assert cldice_counts(predicted, truth).tolist() == [8, 8, 8, 8]


# --- wrong input


@pytest.mark.parametrize(
    ("probability", "target", "message"),
    [
        (torch.rand(2, 1, 4, 4), torch.zeros(2, 4, 4).long(), r"shape \(2, 1, 4, 4\) and the target \(2, 4, 4\)"),
        (torch.zeros(2, 4, 4).long(), torch.zeros(2, 4, 4).long(), "probabilities are torch.int64"),
        (torch.full((2, 4, 4), 1.001), torch.zeros(2, 4, 4).long(), "outside 0 to 1"),
        (torch.full((2, 4, 4), -0.001), torch.zeros(2, 4, 4).long(), "outside 0 to 1"),
        (torch.full((2, 4, 4), math.nan), torch.zeros(2, 4, 4).long(), "hold NaN"),
        (torch.rand(2, 4, 4), torch.zeros(2, 4, 4), "the target is torch.float32"),
        (torch.rand(2, 4, 4), torch.full((2, 4, 4), 2), "target holds the value 2, expected class indices 0 to 1"),
    ],
)
def test_histogram_refuses_wrong_input_and_stays_as_it_was(probability, target, message):
    histogram = BinaryHistogram()
    with pytest.raises(UserError, match=message) as error:
        histogram.update(probability, target)
    assert "\n" not in str(error.value)
    assert histogram.table.sum() == 0


@pytest.mark.parametrize("wrong", [3, -1, IGNORE])
def test_confusion_matrix_refuses_classes_that_do_not_exist(wrong):
    zeros = torch.zeros(2, 4, 4).long()
    with pytest.raises(UserError, match="expected 0 to 2"):
        confusion(zeros + wrong, zeros, 3)


def test_confusion_matrix_and_image_counts_refuse_probabilities():
    for call in (lambda p, y: confusion(p, y, 3), image_counts, lambda p, y: cldice_counts(p[0], y[0])):
        with pytest.raises(UserError, match="whole numbers"):
            call(torch.rand(2, 4, 4), torch.zeros(2, 4, 4).long())


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold is"):
        BinaryHistogram().counts(threshold)


def test_uint8_masks_as_read_from_files_will_do():
    probability, target = example()
    assert torch.equal(filled(probability, target.to(torch.uint8)).table, filled(probability, target).table)
    assert torch.equal(
        filled(probability.numpy(), target.numpy().astype(np.uint8)).table, filled(probability, target).table
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_counts_are_the_same():
    probability, target = example()
    histogram = BinaryHistogram("cuda")
    histogram.update(probability.cuda(), target.cuda())
    assert torch.equal(histogram.table.cpu(), filled(probability, target).table)


def test_a_class_that_the_truth_does_not_hold_is_left_out_of_the_means_even_if_predicted():
    matrix = confusion(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 1, 0, IGNORE]]), 3)
    values = matrix.scores()
    assert values["per_class"]["iou"] == [0.5, 1.0, 0.0]
    assert values["iou"] == pytest.approx(0.75)
    assert class_mean(iou, matrix.counts()) == pytest.approx(0.75)
    assert math.isnan(class_mean(iou, np.zeros((3, 4))))
