"""From predictions to scores: streaming tables on the device, and counts per image, with 255 left out.

Tables only add whole numbers: batches, processes and files in any order give the same score to the last bit.
Probabilities are compared as the 16-bit numbers of `predict`'s PNG, so a file scores exactly as the network did.
"""

import math
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor

from unet_helpers.config import IGNORE, UserError
from unet_helpers.losses import check_labels
from unet_helpers.scores import SCORES, Score, defined_mean, dice, iou, ratio, scores

LEVELS = 65536  # of a 16-bit probability
THIN = 64  # pixels: objects thicker than twice this have no centre line worth the seconds that finding it takes


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities, float32, of logits: (B, 1, H, W) to (B, H, W) by sigmoid; (B, K, H, W) to the same by softmax."""
    return logits.float().sigmoid()[:, 0] if logits.shape[1] == 1 else logits.float().softmax(1)


def quantise(probability: Tensor) -> Tensor:
    """Probabilities, float in [0, 1] (else `UserError`), any shape, as int64 0..65535: what the 16-bit PNG holds."""
    probability = torch.as_tensor(probability)
    if not probability.is_floating_point():
        raise UserError(f"probabilities are {probability.dtype}, expected floating point numbers from 0 to 1")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise UserError("probabilities hold NaN or values outside 0 to 1: apply sigmoid or softmax to logits first")
    return (probability.float() * (LEVELS - 1)).round().long()


def level(threshold: float) -> int:
    """Smallest 16-bit probability that counts as foreground: the first q with q / 65535 >= threshold (in [0, 1])."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}, expected a number from 0 to 1")
    return math.ceil(threshold * (LEVELS - 1))


def foreground(probability: Tensor, threshold: float) -> Tensor:
    """Which pixels are foreground, bool: 16-bit probability >= threshold. The one rule for all scores and masks."""
    return quantise(probability) >= level(threshold)


class _Tally:
    """An int64 table that grows by addition, on the device that the predictions are on."""

    def __init__(self, *shape: int, device: torch.device | str = "cpu"):
        self.table = torch.zeros(shape, dtype=torch.int64, device=device)

    def _add(self, cell: Tensor, valid: Tensor) -> None:
        size = self.table.numel()  # ignored pixels go to one cell more, which is dropped
        cell = torch.where(valid, cell, size).flatten()
        cell = cell.cpu() if cell.is_mps else cell  # where it takes seconds
        self.table += torch.bincount(cell, minlength=size + 1)[:size].view_as(self.table).to(self.table.device)


class BinaryHistogram(_Tally):
    """How many background (row 0) and foreground (row 1) pixels got each of the 65,536 16-bit probabilities."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(2, LEVELS, device=device)

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Count a batch: probability, float in [0, 1], target, integer 0, 1, or 255: ignored; else `UserError`."""
        q = quantise(probability)
        target = _checked(q, target, num_classes=1)
        self._add(target * LEVELS + q, target != IGNORE)

    def counts(self, threshold: float) -> np.ndarray:
        """tp, fp, fn, tn (4,) int64 when foreground is probability >= threshold."""
        table, first = self.table.cpu().numpy(), level(threshold)
        (tn, fn), (fp, tp) = table[:, :first].sum(1), table[:, first:].sum(1)
        return np.array([tp, fp, fn, tn])

    def roc_auc(self) -> float:
        """Area under the ROC curve by trapezoids: how often foreground scores above background, ties counting half."""
        negative, positive = self.table.cpu().numpy().astype(np.float64)
        return float(ratio((positive * (np.cumsum(negative) - negative / 2)).sum(), positive.sum() * negative.sum()))

    def pr_auc(self) -> float:
        """Average precision, Σ (R_n - R_{n-1})·P_n over all thresholds, without interpolation, as in scikit-learn."""
        fp, tp = self.table.cpu().numpy()[:, ::-1].cumsum(1).astype(np.float64)
        precision_at = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp + fp > 0)
        return float(ratio((np.diff(tp, prepend=0) * precision_at).sum(), tp[-1]))

    def best_threshold(self) -> float:
        """The multiple of .0001 with the highest pooled Dice: the middle of the lowest run of equals (of all: .5)."""
        table = self.table.cpu().numpy()[:, ::-1].cumsum(1)[:, ::-1]  # at or above each level
        candidates = np.arange(1, 10_000) / 10_000
        fp, tp = table[:, [level(threshold) for threshold in candidates]]
        values = np.nan_to_num(dice(np.stack([tp, fp, table[1, 0] - tp, 0 * tp], -1)))
        first = int(values.argmax())
        length = int(np.append(values[first:] == values[first], False).argmin())  # up to the first that is no equal
        return float(candidates[first + (length - 1) // 2])

    def scores(self, threshold: float) -> dict[str, float]:
        """All `SCORES` at the threshold, `roc_auc`, `pr_auc`, and `correct` and `total` pixels behind the accuracy."""
        counts = self.counts(threshold)
        totals = {"correct": int(counts[0] + counts[3]), "total": int(counts.sum())}
        return scores(counts) | {"roc_auc": self.roc_auc(), "pr_auc": self.pr_auc()} | totals


class ConfusionMatrix(_Tally):
    """How many pixels of true class (row) got which predicted class (column)."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        super().__init__(num_classes, num_classes, device=device)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count a batch: predicted and target (B, H, W) integer classes, target 255 ignored; else `UserError`."""
        k, predicted = len(self.table), torch.as_tensor(predicted)
        target = _checked(predicted, target, k)
        if ((predicted < 0) | (predicted >= k)).any():
            raise UserError(f"predicted classes are {predicted.min()} to {predicted.max()}, expected 0 to {k - 1}")
        self._add(target * k + predicted, target != IGNORE)

    def counts(self) -> np.ndarray:
        """(K, 4) int64: tp, fp, fn, tn of each class against all others."""
        table = self.table.cpu().numpy()
        tp = table.diagonal()
        fp, fn = table.sum(0) - tp, table.sum(1) - tp
        return np.stack([tp, fp, fn, table.sum() - tp - fp - fn], -1)

    def scores(self) -> dict:
        """`class_mean` of all `SCORES`, but `accuracy` = `correct` / `total` pixels and `mcc` over all classes at once,
        Gorodkin's R_K (2004), as in scikit-learn; and `per_class`: {"dice": [K values, NaN where undefined], ...}.
        """
        counts, table = self.counts(), self.table.cpu().numpy().astype(np.float64)
        per_class = {name: score(counts).tolist() for name, score in SCORES.items()}
        correct, total, true, said = table.trace(), table.sum(), table.sum(1), table.sum(0)
        spread = np.sqrt((total**2 - (true**2).sum()) * (total**2 - (said**2).sum()))
        means = {name: float(class_mean(score, counts)) for name, score in SCORES.items()}
        means |= {"accuracy": float(ratio(correct, total)), "mcc": float(ratio(correct * total - true @ said, spread))}
        return means | {"correct": int(correct), "total": int(total), "per_class": per_class}


def class_mean(score: Score, counts) -> np.ndarray:
    """Mean of a score over the classes, (..., K, 4) -> (...), of those that the truth holds and it is defined for."""
    # A class that does not occur has no IoU: it would be 0 or nothing depending on one wrong pixel.
    tp, _, fn, _ = np.moveaxis(np.asarray(counts), -1, 0)
    return defined_mean(np.where(tp + fn > 0, score(counts), np.nan))


mean_dice, mean_iou = partial(class_mean, dice), partial(class_mean, iou)


def image_counts(predicted: Tensor, target: Tensor, num_classes: int = 1) -> np.ndarray:
    """tp, fp, fn, tn of each image, (B, 4) int64, or of each of several classes against all others, (B, K, 4).

    Predicted (B, H, W) bool or integer classes; target (B, H, W) integer classes, 255 ignored.
    """
    predicted = torch.as_tensor(predicted)
    target, counts = _checked(predicted, target, num_classes), []
    for pictures in zip(predicted, target, strict=True):
        table = ConfusionMatrix(max(2, num_classes), predicted.device)
        table.update(*pictures)
        counts.append(table.counts()[1] if num_classes == 1 else table.counts())
    return np.stack(counts)


def cldice_counts(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Skeleton counts of one image for `cldice`; add them up over images to pool.

    From predicted (H, W) bool or 0/1 and target (H, W) 0, 1, or 255 (background for both) to (4,) int64: pixels of the
    predicted skeleton inside the true vessels and in all, and the reverse. All NaN if the truth is not thin (`THIN`).
    """
    from skimage.morphology import skeletonize  # half a second, which only clDice should cost

    predicted = torch.as_tensor(predicted).cpu()
    target = _checked(predicted, target, num_classes=1).cpu().numpy()
    p, y = (predicted.numpy() != 0) & (target != IGNORE), target == 1
    if cv2.distanceTransform(y.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max() > THIN:
        return np.full(4, np.nan)
    skeleton_p, skeleton_y = skeletonize(p), skeletonize(y)
    return np.array([(skeleton_p & y).sum(), skeleton_p.sum(), (skeleton_y & p).sum(), skeleton_y.sum()])


def _checked(predicted: Tensor, target, num_classes: int) -> Tensor:
    """The target as int64 on the device of the prediction, after checking both."""
    target = torch.as_tensor(target)
    if predicted.shape != target.shape:
        shapes = f"the prediction has shape {tuple(predicted.shape)} and the target {tuple(target.shape)}"
        raise UserError(f"{shapes}, expected (batch, height, width) for both")
    for name, tensor in (("the prediction", predicted), ("the target", target)):
        if tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}, expected whole numbers")
    target = target.to(predicted.device, torch.int64)
    check_labels(target, num_classes)
    return target
