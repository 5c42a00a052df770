"""What training minimises: cross-entropy plus a share of soft Dice, with pixels marked 255 left out.

Cross-entropy asks every pixel to be right, soft Dice the overlap of regions, however much background there is. Both
follow from sums that are added up over processes first: several GPUs minimise what one with the whole batch would.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unet_helpers.config import IGNORE, UserError, need


def check_labels(target, num_classes: int, name: str = "target") -> None:
    """Raise `UserError`, which names `name`, if `target` (tensor or array) holds anything but classes and 255."""
    allowed = max(num_classes, 2)  # binary (num_classes = 1): 0 and 1
    wrong = (target != IGNORE) & ((target < 0) | (target >= allowed))
    if wrong.any():
        remedy = "check num_classes and what the values in the mask files mean"
        expected = f"expected class indices 0 to {allowed - 1}, or {IGNORE} for pixels to ignore"
        raise UserError(f"{name} holds the value {target[wrong][0].item()}, {expected}: {remedy}")


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over valid pixels of -log p (foreground) and -log(1-p) (background), with p = sigmoid(logit).

    Both are softplus(z) - z·y, softplus(z) = log(1 + e^z): no logarithm of a rounded 0. Logits (B, 1, H, W) of any
    float type, computed in float32 or wider, and target (B, H, W) int64 (0, 1, or 255: ignored) to a scalar; 0 with
    gradient 0 if no pixel is valid. `UserError` if shapes, types or (on the CPU) labels are others, as all losses here.
    """
    pixels, total = _cross_entropy_sums(*_prepare(logits, target, num_classes=1))
    return total / pixels.clamp(min=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over valid pixels of -log p of the true class, with p = softmax(logits).

    That is logsumexp(z) - z[true class]. Else as `binary_cross_entropy`, of logits (B, K > 1, H, W), labels 0..K-1.
    """
    pixels, total = _cross_entropy_sums(*_prepare(logits, target))
    if logits.shape[1] == 1:
        raise UserError("cross_entropy got logits with one channel, expected at least 2: use binary_cross_entropy")
    return total / pixels.clamp(min=1)


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2·Σ p·y / (Σ p + Σ y), sums over all valid pixels of the batch; multi-class: the mean over all K classes.

    A class that no valid pixel belongs to adds 0 (as in `segmentation_models_pytorch`): only cross-entropy punishes its
    false positives, and a class's weight is the same whichever others are in the batch. Any other has a denominator of
    at least 1, so nothing needs to be smoothed. Logits (B, 1 or K, H, W) to a scalar from 0 to 1; all else as in
    `binary_cross_entropy`. Source: V-Net, Milletari et al. 2016, arXiv:1606.04797, but no squares in the denominator.
    """
    return _dice_loss(_dice_sums(*_prepare(logits, target)))


class SegmentationLoss(nn.Module):
    """Cross-entropy + dice_weight · soft Dice loss, over one process or over many.

    Binary (num_classes = 1) takes `binary_cross_entropy`, otherwise `cross_entropy`; see there and at `soft_dice_loss`.
    With `class_weights`, a number for each class (binary: background, foreground), cross-entropy is the mean over valid
    pixels weighted by their true class, as in torch. Labels are checked on the CPU only: a GPU would have to wait.

    Over W processes: with s_r the sums of process r and S = Σ s_r, the loss is L(S) (not the mean of the L(s_r) unless
    all have equally many valid pixels). Its gradient is Σ_r L'(S)·∂s_r, but DDP averages to (1/W)·Σ_r g_r. Therefore
    process r returns a scalar with the value L(S), ready to be logged, and the gradient g_r = W·L'(S)·∂s_r.
    """

    def __init__(self, num_classes: int, dice_weight=0.5, class_weights: Sequence[float] | None = None):
        """Raises `UserError` for num_classes outside 1..255, dice_weight below 0, or not as many class weights."""
        super().__init__()
        need(1 <= num_classes <= IGNORE, "num_classes", num_classes, f"1 (binary) to {IGNORE}, which means ignore")
        need(0 <= dice_weight < math.inf, "dice_weight", dice_weight, "0 or more")
        given, wanted = class_weights, max(2, num_classes)
        need(given is None or len(given) == wanted, "class_weights", given, f"{wanted} numbers")
        self.num_classes, self.dice_weight = num_classes, dice_weight
        self.class_weights = None if given is None else torch.tensor(given, dtype=torch.float32)

    def forward(self, logits: Tensor, target: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The loss of the batch, a scalar; with `reduce`, of all processes' batches, its gradient what DDP averages.

        Logits are (B, 1 or K, H, W) of any float type, target (B, H, W) int64, see `binary_cross_entropy`; computed in
        float32 or wider, also under autocast. `reduce`, called once by every process, turns a float tensor into its sum
        over processes: `lambda sums: accelerator.reduce(sums, reduction="sum")`.
        """
        local = self.sums(logits, target)
        if reduce is None:
            return self.from_sums(local)
        total = reduce(torch.cat([local.detach(), local.new_ones(1)]))  # the ones add up to the number of processes
        loss = self.from_sums(total[:-1] + (local - local.detach()))  # the value of S, the gradient of s_r
        return loss.detach() + total[-1] * (loss - loss.detach())

    def sums(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weight of valid pixels, Σ cross-entropy, per class Σ p·y, Σ p, Σ y: (2 + 3K,), to be added up."""
        z, truth, valid = _prepare(logits, target, self.num_classes)
        weight = valid
        if self.class_weights is not None:
            weight = valid * self.class_weights.to(z.device)[target.masked_fill(target == IGNORE, 0)[:, None]]
        return torch.cat([_cross_entropy_sums(z, truth, weight), _dice_sums(z, truth, valid)])

    def from_sums(self, sums: Tensor) -> Tensor:
        """The loss, a scalar, from (added up) `sums`. A whole validation set is best added up in float64."""
        return sums[1] / sums[0].where(sums[0] > 0, 1) + self.dice_weight * _dice_loss(sums[2:])


def _prepare(logits: Tensor, target: Tensor, num_classes: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K, H, W) in float32 with 0 at ignored pixels, truth (B, K, H, W) bool, valid (B, 1, H, W) bool."""
    if logits.ndim != 4 or num_classes not in (None, logits.shape[1]):
        expected = f"(batch, {num_classes or 'classes'}, height, width): one channel for binary, else one per class"
        raise UserError(f"logits have shape {tuple(logits.shape)}, expected {expected}")
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        hint = ", without a channel axis: use target.squeeze(1)" if target.ndim == 4 and target.shape[1] == 1 else ""
        raise UserError(f"target has shape {tuple(target.shape)}, expected (batch, height, width) = {expected}{hint}")
    if not logits.is_floating_point() or target.dtype != torch.int64:
        types = f"logits are {logits.dtype} and target is {target.dtype}"
        raise UserError(f"{types}, expected floating point and torch.int64 class indices: use target.long()")
    channels = logits.shape[1]
    if target.device.type == "cpu":
        check_labels(target, channels)
    valid = (target != IGNORE)[:, None]
    classes = torch.arange(channels, device=target.device) + (channels == 1)  # binary: the one channel is class 1
    truth = target[:, None] == classes[:, None, None]
    # Zeroed here rather than at the end: an infinite logit at an ignored pixel must not reach sum or gradient as 0·inf.
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~valid, 0)
    return z, truth & valid, valid


def _cross_entropy_sums(z: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Sum of the pixels' weights (or which are valid), and weighted Σ cross-entropy, (2,)."""
    if z.shape[1] == 1:
        terms = nn.functional.softplus(z) - z * truth
    else:
        terms = z.logsumexp(1, keepdim=True) - (z * truth).sum(1, keepdim=True)
    return torch.stack([weight.sum().to(z.dtype), (terms * weight).sum()])


def _dice_sums(z: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Per class Σ p·y, Σ p and Σ y over valid pixels, (3K,)."""
    probability = (z.sigmoid() if z.shape[1] == 1 else z.softmax(1)) * valid
    over = (0, 2, 3)
    return torch.cat([(probability * truth).sum(over), probability.sum(over), truth.sum(over).to(z.dtype)])


def _dice_loss(sums: Tensor) -> Tensor:
    intersection, predicted, true = sums.chunk(3)
    loss = 1 - 2 * intersection / (predicted + true).clamp(min=1)  # the clamp only concerns absent classes
    return (loss * (true > 0)).mean()
