"""Score a network under one protocol: native size, 255 left out, counts pooled over all images, one threshold."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unet_helpers import metrics, scores
from unet_helpers.catalogue import class_names
from unet_helpers.config import IGNORE, Config, DataConfig, RunError, UserError
from unet_helpers.datasets import WholeImages, find_samples
from unet_helpers.losses import SegmentationLoss
from unet_helpers.prediction import drop_specks, find_views, predict_logits, predict_probabilities
from unet_helpers.runs import Run, load_run
from unet_helpers.system import find_device, write_json


@dataclass
class Evaluation:
    """What was counted on a set of images, from which every score follows."""

    num_classes: int  # 1 for binary
    class_names: list[str]
    groups: list[str]  # that the images belong to
    table: metrics.BinaryHistogram | metrics.ConfusionMatrix  # pooled over all images
    one_vs_rest: list[metrics.BinaryHistogram]  # several classes: of each class's probability
    names: list[str] = field(default_factory=list)  # of the images
    image_counts: list[np.ndarray] = field(default_factory=list)  # tp, fp, fn, tn: (4,), several classes (K, 4)
    skeletons: list[np.ndarray] = field(default_factory=list)  # the counts that clDice needs; binary only

    def by_group(self) -> dict[str, np.ndarray]:
        """Counts of each group, summed over its images."""
        counts, groups = np.stack(self.image_counts), np.array(self.groups)
        return {group: counts[groups == group].sum(0) for group in dict.fromkeys(self.groups)}

    def counts(self) -> np.ndarray:
        """For `scores`, one row a group, as views of a car are not independent: (N, 4), or of classes (1, N, K, 4)."""
        counts = np.stack(list(self.by_group().values()))
        return counts if self.num_classes == 1 else counts[None]


def predictions(model: nn.Module, images: WholeImages, device: torch.device, flips: bool | str) -> Iterator[tuple]:
    """Probability, at the size of the mask, mask, and name of one image after the other; the first two on `device`."""
    flips = find_views(images.config, flips)
    for image, mask, name in images:
        yield predict_probabilities(model, image.to(device), flips, size=mask.shape), mask.to(device), name


def choose_threshold(model: nn.Module, images: WholeImages, device: torch.device, flips: bool | str = True) -> float:
    """The threshold with the highest pooled Dice on (validation) images; see `score_images`."""
    histogram = metrics.BinaryHistogram(device)
    for probability, mask, _ in predictions(model, images, device, flips):
        histogram.update(probability, mask)
    return histogram.best_threshold()


def score_images(model, images: WholeImages, num_classes: int, device, threshold, flips=True, min_size=0) -> Evaluation:
    """Predict images one by one at their own size, with a model in evaluation mode, and count; see `Evaluation`."""
    table = metrics.BinaryHistogram(device) if num_classes == 1 else metrics.ConfusionMatrix(num_classes, device)
    one_vs_rest = [metrics.BinaryHistogram(device) for _ in range(num_classes)] if num_classes > 1 else []
    classes, groups = class_names(images.config.data, num_classes), [sample.group for sample in images.samples]
    result = Evaluation(num_classes, classes, groups, table, one_vs_rest)
    for probability, mask, name in predictions(model, images, device, flips):
        result.names.append(name)
        probability = drop_specks(probability, threshold, min_size)
        if num_classes == 1:
            table.update(probability, mask)
            predicted = metrics.foreground(probability, threshold)
            result.skeletons.append(metrics.cldice_counts(predicted, mask))
        else:
            predicted = probability.argmax(0)
            table.update(predicted, mask)
            for k, histogram in enumerate(one_vs_rest):
                histogram.update(probability[k], torch.where(mask == IGNORE, mask, (mask == k).long()))
        result.image_counts.append(metrics.image_counts(predicted[None], mask[None], num_classes)[0])
    return result


def summarise(result: Evaluation, threshold: float | None, flips: bool) -> dict:
    """All scores of the protocol as one dictionary; what is 0/0 is NaN and `undefined` says why."""
    counts, groups = np.stack(result.image_counts), result.by_group()
    if result.num_classes == 1:
        values, several, dice, iou = result.table.scores(threshold), {}, scores.dice, scores.iou
        values["cldice"] = float(scores.cldice(np.sum(result.skeletons, axis=0)))
        reasons = {"cldice": "the objects are not thin"} if np.isnan(result.skeletons).any() else {}
    else:
        values, dice, iou = result.table.scores(), metrics.mean_dice, metrics.mean_iou
        for name in ("roc_auc", "pr_auc"):
            values[name] = float(scores.defined_mean([getattr(h, name)() for h in result.one_vs_rest]))
        values["cldice"], reasons = float("nan"), {"cldice": "defined for binary masks only"}
        absent = [name for name, (tp, _, fn, _) in zip(result.class_names, counts.sum(0), strict=True) if tp + fn == 0]
        several = {"classes": result.class_names, "absent": absent, "per_class": values["per_class"]}
        each = result.counts()[0].swapaxes(0, 1)[:, None, :, None]  # a set of one class for each
        intervals = [list(scores.bootstrap_interval(one, metrics.mean_dice)) for one in each]
        several |= {"per_class_dice_ci95": intervals, "confusion": result.table.table.tolist()}
    reasons |= {"dice_ci95": scores.ONE_IMAGE} if len(groups) == 1 else {}
    per_image, pooled = dice(counts), (groups if len(groups) < len(counts) else {})  # where each is of one image, none
    order = ("dice", "iou", "sensitivity", "specificity", "precision", "accuracy", "correct", "total", "mcc")
    summary = {name: values[name] for name in (*order, "roc_auc", "pr_auc", "cldice")} | {"threshold": threshold}
    summary |= {"dice_ci95": list(scores.bootstrap_interval(result.counts(), dice))}
    summary |= {"mean_image_dice": float(scores.defined_mean(per_image))}
    summary |= {"per_image_dice": dict(zip(result.names, per_image.tolist(), strict=True))}
    summary |= {"tta": flips, "n_images": len(counts), "n_pixels": values["total"]} | several
    summary |= {"per_group": {name: {"dice": float(dice(c)), "iou": float(iou(c))} for name, c in pooled.items()}}
    return summary | {"undefined": scores.undefined(values) | reasons}


def evaluate(run: Path | str, data: DataConfig | None = None, split="test", save: bool = False, **options) -> dict:
    """Score a run, given by its folder, on one split of a data set, by default the one it was trained on.

    The `options` `flips` (by default True), `min_size` (0) and `device` are those of `predict`. `save` also writes the
    scores into the run's `metrics.json`, under the split's name (after that of another data set or folder), and counts
    the reading; on `val` it chooses an ensemble's threshold. Returns what `summarise` does; `UserError` as `score_run`.
    """
    opened, result = score_run(run, data, split, choose=save and split == "val", **options)
    summary = summarise(result, opened.threshold, find_views(opened.config, options.get("flips", True)))
    summary["min_size"] = options.get("min_size", 0)
    if save:
        other = Path(data.root).resolve().name if data and data.name == "folder" else data and data.name
        key = f"{other}_{split}" if data and not same_images(data, opened.config.data) else split
        reads = opened.metrics.get("reads", {})
        opened.metrics |= {key: summary, "reads": reads | {key: reads.get(key, 0) + 1}}
        write_json(opened.path / "metrics.json", opened.metrics)
    return summary


def compare(run_a: Path | str, run_b: Path | str, data: DataConfig | None = None, split="test", **options) -> dict:
    """Dice of run A minus Dice of run B on the same images, with its paired bootstrap interval over groups."""
    a, b = (score_run(run, data, split, **options)[1] for run in (run_a, run_b))
    if (a.names, a.groups, a.num_classes) != (b.names, b.groups, b.num_classes):
        raise UserError(f"{run_a} and {run_b} cannot be compared: they differ in their images, groups or classes.")
    return scores.paired_difference(a.counts(), b.counts(), scores.dice if a.num_classes == 1 else metrics.mean_dice)


def score_run(run, data, split: str, flips=True, device="auto", min_size=0, choose=False) -> tuple[Run, Evaluation]:
    """Open a run and count on one split; of an ensemble, `choose` the threshold there. `UserError` if they cannot be
    used, or if the run, or one of the ensemble's, was trained on an image of the split.
    """
    opened, target = load_run(run), find_device(device)
    own, joined = opened.config.data, "runs" in opened.metrics
    here = replace(data or own, normalisation=own.normalisation, longest_side=own.longest_side)  # as in its training
    config, classes = replace(opened.config, data=here), opened.config.model.num_classes
    if classes > 1 and own.name != "folder" != here.name and class_names(own, classes) != class_names(here, classes):
        raise UserError(f"{run}: knows {', '.join(class_names(own, classes))}: not the classes of {here.name}.")
    images = WholeImages(samples_of(config, split), config)
    known = {sample.name for sample in images.samples} & set(opened.metrics.get("training_images", []))
    if known and split != "train" and same_images(here, own):
        raise UserError(f"{run}: was trained on {min(known)}, which is in the split {split}: its score would mislead.")
    model = opened.model.to(target)
    if choose and joined and classes == 1 and same_images(here, own):
        opened.metrics["threshold"] = choose_threshold(model, images, target, flips)
    return opened, score_images(model, images, classes, target, opened.threshold, flips, min_size)


def same_images(one: DataConfig, other: DataConfig) -> bool:
    """Whether two configurations are of the same data set, and, of folders, of the same one."""
    folders = {os.path.realpath(os.path.expanduser(data.root)) for data in (one, other)}
    return one.name == other.name and (one.name != "folder" or len(folders) == 1)


def samples_of(config: Config, split: str) -> list:
    """The samples of one split, of which there must be some."""
    samples = [sample for sample in find_samples(config.data) if sample.split == split]
    if not samples:
        raise UserError(f"data.name={config.data.name}: the split {split} holds no images: change the splits' shares.")
    return samples


@torch.inference_mode()
def validate(model: nn.Module, images: WholeImages, loss_function: SegmentationLoss, accelerator) -> dict:
    """The quick look after every epoch: one plain prediction an image, shared among the processes of `accelerator`.

    Returns `loss` over all images together, `accuracy` with `correct` and `total` pixels at threshold .5, and `dice` at
    the `threshold` that makes it largest (several classes: mean Dice, None). Leaves the model in evaluation mode.
    """
    device, num_classes = accelerator.device, loss_function.num_classes
    table = metrics.BinaryHistogram(device) if num_classes == 1 else metrics.ConfusionMatrix(num_classes, device)
    model.eval()
    sums = torch.zeros(2 + 3 * num_classes, dtype=torch.float64)
    for index in range(accelerator.process_index, len(images), accelerator.num_processes):
        image, mask, _ = images[index]
        logits, mask = predict_logits(model, image[None].to(device)), mask[None].to(device)
        sums += loss_function.sums(logits, mask).cpu().double()
        if not sums.isfinite().all():
            raise RunError("The validation loss is no number, the weights diverged: lower training.learning_rate.")
        table.update(metrics.probabilities(logits) if num_classes == 1 else logits.argmax(1), mask)
    table.table = accelerator.reduce(table.table, "sum")
    sums = accelerator.reduce(sums.to(device, torch.float64 if device.type != "mps" else torch.float32), "sum")
    threshold = table.best_threshold() if num_classes == 1 else None
    best, plain = (table.scores(threshold), table.scores(0.5)) if num_classes == 1 else (table.scores(),) * 2
    scored = {name: plain[name] for name in ("accuracy", "correct", "total")}
    return scored | {"loss": loss_function.from_sums(sums).item(), "dice": best["dice"], "threshold": threshold}
