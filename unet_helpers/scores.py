"""How good a segmentation is, and how sure that is: plain functions of pixel counts, which `metrics` collects.

Counts are pooled over all pixels of all images first, and the score is computed from them once. A score that is 0/0
is NaN, and `undefined` says why; it is never 0 or 1 by accident. (Predicting nothing where there is something to be
found is no such case: its Dice is 0.)

With other test images the score would have been another one. The bootstrap imitates that: it draws as many images
again, with replacement, pools their counts and computes the score anew, thousands of times. Images are drawn and not
pixels, because the pixels of one image stand or fall together.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from unet_helpers.config import UserError

Score = Callable[[np.ndarray], np.ndarray]  # (..., 4) counts -> (...) scores, such as `dice`
ONE_IMAGE = "a single image says nothing about the spread between images"
REASONS = dict.fromkeys(("dice", "iou", "cldice"), "no positive pixels in the ground truth or the prediction") | {
    "accuracy": "no pixels to score",
    "sensitivity": "no positive pixels in the ground truth",
    "specificity": "no negative pixels in the ground truth",
    "precision": "no positive pixels in the prediction",
    "mcc": "all pixels have the same class in the ground truth or in the prediction",
    "roc_auc": "all pixels have the same class in the ground truth",
    "pr_auc": "no positive pixels in the ground truth",
}


def dice(counts) -> np.ndarray:
    """2·tp / (2·tp + fp + fn).

    Like all scores here it takes counts (..., 4) in the order tp, fp, fn, tn and returns float64 (...), NaN for 0/0.
    """
    tp, fp, fn, _ = _split(counts)
    return ratio(2 * tp, 2 * tp + fp + fn)


def iou(counts) -> np.ndarray:
    """tp / (tp + fp + fn), the Jaccard index."""
    tp, fp, fn, _ = _split(counts)
    return ratio(tp, tp + fp + fn)


def accuracy(counts) -> np.ndarray:
    """(tp + tn) / all."""
    tp, fp, fn, tn = _split(counts)
    return ratio(tp + tn, tp + fp + fn + tn)


def sensitivity(counts) -> np.ndarray:
    """tp / (tp + fn), also called recall."""
    tp, _, fn, _ = _split(counts)
    return ratio(tp, tp + fn)


def specificity(counts) -> np.ndarray:
    """tn / (tn + fp)."""
    _, fp, _, tn = _split(counts)
    return ratio(tn, tn + fp)


def precision(counts) -> np.ndarray:
    """tp / (tp + fp)."""
    tp, fp, _, _ = _split(counts)
    return ratio(tp, tp + fp)


def mcc(counts) -> np.ndarray:
    """Matthews correlation coefficient, (tp·tn - fp·fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) (Matthews 1975)."""
    tp, fp, fn, tn = _split(counts)
    value = ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn)) * np.sqrt((tn + fp) * (tn + fn)))
    return np.clip(value, -1, 1)  # rounding may lead past the ends


SCORES = {f.__name__: f for f in (dice, iou, accuracy, sensitivity, specificity, precision, mcc)}


def scores(counts) -> dict[str, float]:
    """All `SCORES` of one set of counts."""
    return {name: float(score(counts)) for name, score in SCORES.items()}


def undefined(values: dict) -> dict[str, str]:
    """For each value that is NaN the reason: {"precision": "no positive pixels in the prediction"}."""
    return {name: REASONS[name] for name, value in values.items() if name in REASONS and math.isnan(value)}


def defined_mean(values) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN; NaN where there are none."""
    values = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0).sum(-1), there.sum(-1))


def cldice(counts) -> np.ndarray:
    """Centre-line Dice, 2·T_prec·T_sens / (T_prec + T_sens), of `metrics.cldice_counts` (..., 4).

    T_prec is the share of the predicted skeleton inside the true vessels, T_sens that of the true skeleton inside the
    predicted ones. 0 where one skeleton is empty, NaN where both are. Source: Shit et al. 2021, arXiv:2003.07311.
    """
    p_in_y, p, y_in_p, y = _split(counts)
    denominator = p_in_y * y + y_in_p * p  # of the same fraction, multiplied by p·y, which may be 0
    return np.where((denominator == 0) & (p + y > 0), 0.0, ratio(2 * p_in_y * y_in_p, denominator))[()]


def _split(counts) -> np.ndarray:
    return np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)  # float64: products of pixel counts overflow int64


def ratio(numerator, denominator) -> np.ndarray:
    """Quotient, float64, NaN without a warning where the denominator is 0."""
    shape = np.broadcast(numerator, denominator).shape
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=np.asarray(denominator) != 0)[()]


def bootstrap_interval(
    counts, score: Score, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval, over images, of a score that is computed from pooled counts (Efron 1979).

    Args:
        counts: (N, 4) pixel counts of N images; or (S, N, 4), the same images predicted by S runs of different seeds:
            runs and images are drawn independently, and the score is the mean over the runs drawn. Several classes:
            (S, N, K, 4), also for S = 1, with a score that takes (..., K, 4).
        score: from pooled counts (..., 4) to scores (...), e.g. `dice`.
        samples: how often to draw.
        seed: the same seed gives the same interval.
        level: share of the draws that lie in the interval, between 0 and 1.

    Returns:
        (low, high), without the draws in which the score is undefined (no positive pixel in any image drawn, say).
        Both are NaN when no draw is left and for one single image (`ONE_IMAGE` is the reason to print).

    Raises:
        UserError: a shape or setting is not as above.
    """
    counts = _checked(counts, samples, level)
    if counts.shape[1] == 1:
        return float("nan"), float("nan")
    draws = [_seed_mean(_pooled(score, counts, images), seeds) for seeds, images in _draws(counts, samples, seed)]
    return _percentiles(np.concatenate(draws), level)


def paired_difference(
    counts_a, counts_b, score: Score, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict[str, float | bool]:
    """Score of A minus score of B with its bootstrap interval: the same images (and seeds) are drawn for both.

    An image that is hard for A is hard for B as well; drawn in pairs, such common ups and downs cancel.

    Arguments and errors as in `bootstrap_interval`; B's counts are those of the same images in the same order, seed s
    beside seed s of A, and of a score larger must be better.

    Returns:
        `difference` (of the scores of all images, mean over seeds), `low`, `high`, and `better`: whether A is better
        than B, i.e. the whole interval lies above 0. With one image the interval is NaN and `better` is False. Five
        seeds are few, and the bootstrap makes the interval of so few somewhat too narrow: mistrust a close call.
    """
    a, b = _checked(counts_a, samples, level), _checked(counts_b, samples, level)
    if a.shape != b.shape:
        remedy = "compare the same images with the same number of seeds"
        raise UserError(f"counts have shapes {np.shape(counts_a)} and {np.shape(counts_b)}, expected equal: {remedy}")

    def differences(images: np.ndarray) -> np.ndarray:
        return _pooled(score, a, images) - _pooled(score, b, images)

    difference = float(differences(np.ones((1, a.shape[1]))).mean())
    draws = [_seed_mean(differences(images), seeds) for seeds, images in _draws(a, samples, seed)]
    low, high = _percentiles(np.concatenate(draws), level) if a.shape[1] > 1 else (float("nan"), float("nan"))
    return {"difference": difference, "low": low, "high": high, "better": low > 0}


def _checked(counts, samples: int, level: float) -> np.ndarray:
    """The counts with an axis of seeds in front, float64."""
    if samples < 1 or not 0 < level < 1:
        raise UserError(f"samples is {samples} and level is {level}, expected at least 1 and a number between 0 and 1")
    counts = np.asarray(counts, dtype=np.float64)  # exact up to 2^53 pixels
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim not in (3, 4) or counts.shape[-1] != 4 or 0 in counts.shape:
        expected = "(images, 4), (seeds, images, 4) or (seeds, images, classes, 4): tp, fp, fn, tn of each, none empty"
        raise UserError(f"counts have shape {counts.shape}, expected {expected}")
    return counts


def _draws(counts: np.ndarray, samples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each seed (n, S) and each image (n, N) was drawn, n draws at a time to bound the memory."""
    rng = np.random.default_rng(seed)
    runs, images = counts.shape[:2]
    at_once = max(1, 4_000_000 // (images + runs))
    for start in range(0, samples, at_once):
        n = min(at_once, samples - start)
        yield _multiplicities(rng, n, runs), _multiplicities(rng, n, images)


def _multiplicities(rng: np.random.Generator, n: int, things: int) -> np.ndarray:
    drawn = rng.integers(things, size=(n, things)) + things * np.arange(n)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * things).reshape(n, things).astype(np.float64)


def _pooled(score: Score, counts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Scores (n, S) of the counts pooled over the images drawn, (n, N)."""
    pooled = np.tensordot(images, counts, axes=(1, 1))  # (n, S, ..., 4); whole numbers, so exact in any order
    return np.asarray(score(pooled), dtype=np.float64)


def _seed_mean(scores: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Mean over the seeds drawn, which one that was not drawn must not make NaN."""
    return np.where(seeds > 0, scores * seeds, 0).sum(1) / seeds.sum(1)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]
    if draws.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
