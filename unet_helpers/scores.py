"""How good a segmentation is, and how sure that is: plain functions of pixel counts, which `metrics` collects.

Counts are pooled over all images, and the score is computed from them once; 0/0 is NaN, and `undefined` says why. The
bootstrap imitates other test images: it draws as many again, with replacement, thousands of times, and computes the
score anew. Images, or groups of them, are drawn and not pixels, as the pixels of one image stand or fall together.
"""

import math
from collections.abc import Callable

import numpy as np

from unet_helpers.config import UserError

Score = Callable[[np.ndarray], np.ndarray]  # (..., 4) counts -> (...) scores, such as `dice`
ONE_IMAGE = "a single image, or group of images, says nothing about the spread between them"
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
    """2·tp / (2·tp + fp + fn). All scores here: from counts (..., 4), tp, fp, fn, tn, to float64 (...), NaN for 0/0."""
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
    return ratio(np.nansum(values, -1), (~np.isnan(values)).sum(-1))


def cldice(counts) -> np.ndarray:
    """Centre-line Dice, 2·T_prec·T_sens / (T_prec + T_sens), of `metrics.cldice_counts` (..., 4).

    T_prec is the share of the predicted skeleton inside the true vessels, T_sens the reverse. 0 where one skeleton is
    empty, NaN where both are. Source: Shit et al. 2021, arXiv:2003.07311.
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


def bootstrap_interval(counts, score: Score, samples=10_000, seed=0, level=0.95) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high), over images, of a score computed from pooled counts (Efron 1979).

    Counts are (N, 4) of N images or groups; or (S, N, 4), the same predicted by S runs of different seeds: runs and
    images are drawn independently, and the score is the mean over the runs drawn. Several classes: (S, N, K, 4), also
    for S = 1, with a score that takes (..., K, 4). `score`, e.g. `dice`, maps pooled counts (..., 4) to (...).

    Draws `samples` times, the same for the same `seed`; a share `level` of the draws (0 to 1) lies in the interval. (Of
    few images it is too narrow: of 95%, 91 remain with 20, 78 with 4.) Draws whose score is undefined are left out; NaN
    if none remains, or of one image (`ONE_IMAGE`). Raises `UserError` for other shapes or settings.
    """
    return _bootstrap(_checked(counts, samples, level), score, samples, seed, level)


def paired_difference(counts_a, counts_b, score: Score, samples=10_000, seed=0, level=0.95) -> dict[str, float | bool]:
    """Score of A minus score of B with its bootstrap interval: the same images (and seeds) are drawn for both.

    What is hard for A is hard for B as well; drawn in pairs, such common ups and downs cancel. Arguments and errors as
    in `bootstrap_interval`; images and seeds of B stand in A's order, and of a score larger must be better.

    Returns `difference` (of the scores of all images, mean over seeds), `low`, `high`, `widened` as the fewer of images
    and seeds (unless 1) ask for, and `better`: whether that interval lies above 0 (False with one image: NaN).
    """
    a, b = _checked(counts_a, samples, level), _checked(counts_b, samples, level)
    if a.shape != b.shape:
        remedy = "compare the same images with the same number of seeds"
        raise UserError(f"counts have shapes {np.shape(counts_a)} and {np.shape(counts_b)}, expected equal: {remedy}")
    pairs = np.stack([a, b], axis=2)  # (S, N, 2, ..., 4)

    def difference(pooled: np.ndarray) -> np.ndarray:
        score_a, score_b = np.moveaxis(score(pooled), -1, 0)
        return score_a - score_b

    value, few = float(difference(pairs.sum(1)).mean()), min((n for n in a.shape[:2] if n > 1), default=2)
    low, high = widened(value, *_bootstrap(pairs, difference, samples, seed, level), few, level)
    return {"difference": value, "low": low, "high": high, "better": low > 0}


def widened(value: float, low: float, high: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """A bootstrap interval around a mean over n runs (or images), made as wide as Student's t asks for.

    Drawn with replacement, n values vary too little, by sqrt((n - 1) / n), and the mean of few has longer tails than
    the normal distribution: with five runs over a third is missing (Hesterberg 2014, arXiv:1411.5279).
    """
    from scipy.stats import norm, t  # a second, which only comparisons should cost

    factor = math.sqrt(n / (n - 1)) * t.ppf((1 + level) / 2, n - 1) / norm.ppf((1 + level) / 2)
    return float(value - factor * (value - low)), float(value + factor * (high - value))


def _checked(counts, samples: int, level: float) -> np.ndarray:
    """The counts with an axis of seeds in front, float64."""
    if samples < 1 or not 0 < level < 1:
        raise UserError(f"samples is {samples} and level is {level}, expected at least 1 and a number between 0 and 1")
    counts = np.asarray(counts, dtype=np.float64)  # exact up to 2^53 pixels
    counts = counts[None] if counts.ndim == 2 else counts
    if counts.ndim not in (3, 4) or counts.shape[-1] != 4 or 0 in counts.shape:
        expected = "(images, 4), (seeds, images, 4) or (seeds, images, classes, 4): tp, fp, fn, tn of each, none empty"
        raise UserError(f"counts have shape {counts.shape}, expected {expected}")
    return counts


def _bootstrap(counts: np.ndarray, score: Score, samples: int, seed: int, level: float) -> tuple[float, float]:
    """The interval of `bootstrap_interval`, for counts (S, N, ..., 4) and a score that takes (..., 4)."""
    runs, images = counts.shape[:2]
    rng, draws = np.random.default_rng(seed), []
    at_once = max(1, 4_000_000 // (images + runs))  # bounds the memory
    for start in range(0, samples, at_once):
        n = min(at_once, samples - start)
        run_drawn, image_drawn = _multiplicities(rng, n, runs), _multiplicities(rng, n, images)
        pooled = np.tensordot(image_drawn, counts, axes=(1, 1))  # (n, S, ..., 4); whole numbers, so exact in any order
        # A run whose score is NaN must not make the mean NaN unless it was drawn.
        draws.extend(np.where(run_drawn > 0, score(pooled) * run_drawn, 0).sum(1) / runs)
    draws = [draw for draw in draws if not math.isnan(draw)]
    if images == 1 or not draws:
        return math.nan, math.nan
    return tuple(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist())


def _multiplicities(rng: np.random.Generator, n: int, things: int) -> np.ndarray:
    """How often each of the things is among as many drawn with replacement, n times: (n, things)."""
    drawn = rng.integers(things, size=(n, things)) + things * np.arange(n)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * things).reshape(n, things).astype(np.float64)
