"""Every setting of a run, as nested dataclasses: what `config.yaml` holds, the command line offers and notebooks use.

A configuration is checked once, by `check_config`, before anything is read or written; whatever is wrong ends in a
`UserError`, whose one line names the setting, says what is wrong and what to do.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

IGNORE = 255  # mask value of a pixel that is neither trained on nor scored


class UserError(Exception):
    """Something the user can mend: one line that names the file or setting, what is wrong and what to do."""


class RunError(Exception):
    """Something that went wrong while working, with what to try: one line."""


@dataclass
class DataConfig:
    """Which images, which labels, and how they are split.

    Attributes:
        name: `sample` (built-in synthetic retinas), `drive`, or `folder` (your own images and masks).
        root: the folder below which the data lies, at any depth; unused by `sample`.
        labels: for `sample`: `vessels` (binary) or `artery_vein` (0 background, 1 artery, 2 vein).
        mask_values: for `folder`: what the values in mask files mean. `auto` decides once for the whole data set;
            `binary`: anything but 0 is foreground; `classes`: values are class indices and 255 is "ignore".
        group_pattern: for `folder`: regular expression matched at the start of a file's stem; its first group names what must stay on one
            side of a split. The default is the stem itself without a `__copy` suffix; `(.{12})` is a car in Carvana.
        val_share: share of the groups kept for validation.
        test_share: for `folder` without a test folder: share of the groups kept for testing.
        folds: number of folds for cross-validation; 0 splits once, by `val_share`.
        fold: with `folds`: which fold validates, from 0.
        split_seed: seed of the split.
        sample_images: for `sample`: how many images for training, validation and testing.
        sample_size: for `sample`: height and width of an image in pixels.
    """

    name: Literal["sample", "drive", "folder"] = "sample"
    root: str = "data"
    labels: Literal["vessels", "artery_vein"] = "vessels"
    mask_values: Literal["auto", "binary", "classes"] = "auto"
    group_pattern: str = r"(.+?)(?:__.+)?$"
    val_share: float = 0.2
    test_share: float = 0.2
    folds: int = 0
    fold: int = 0
    split_seed: int = 0
    sample_images: tuple[int, int, int] = (32, 8, 8)
    sample_size: int = 256


@dataclass
class AugmentationConfig:
    """What happens to a training image on its way into the network; a strength of 0 switches a step off.

    Attributes:
        patch_size: height and width in pixels of the patches the network is trained on.
        flips: mirror horizontally and vertically, each half of the time.
        rotation: largest angle in degrees, either way.
        scale: smallest and largest magnification.
        elastic: share of the patches (0 to 1) that are also deformed elastically.
        brightness: largest change, as a share of full scale.
        contrast: largest change of the gain (0.2: between 0.8 and 1.2).
        gamma: largest change of the exponent (0.2: between 0.8 and 1.2).
        noise: largest standard deviation of Gaussian noise, as a share of full scale.
    """

    patch_size: int = 128
    flips: bool = True
    rotation: float = 180.0
    scale: tuple[float, float] = (0.78, 1.28)
    elastic: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.2
    gamma: float = 0.0
    noise: float = 0.02


@dataclass
class ModelConfig:
    """Which network. Widths, padding, norm, activation, upsampling and dropout are those of our own `UNet`.

    Attributes:
        architecture: `unet` is ours; any architecture of segmentation_models_pytorch is named as there (`Unet`, `FPN`).
        encoder: for the latter: name of the encoder, as there (`resnet34`).
        encoder_weights: for the latter: `imagenet` (downloaded), a local weights file, or null for random ones.
        in_channels: channels of the image.
        num_classes: 1 for a binary problem (one logit, sigmoid), else the number of classes (softmax).
        widths: channels at each level, from full resolution to the bottom.
        padding: `same` keeps the size; `valid` is the paper's, whose output is smaller than its input.
        norm: between every convolution and its activation.
        activation: `relu`, `leaky_relu`, `gelu`, `silu`, `mish` or `pysilu`.
        upsampling: `transpose` (learned) or `bilinear` (interpolation and a convolution).
        dropout: share of the channels dropped at the bottom during training.
    """

    architecture: str = "unet"
    encoder: str = "resnet34"
    encoder_weights: str | None = None
    in_channels: int = 3
    num_classes: int = 1
    widths: tuple[int, ...] = (16, 32, 64, 128)
    padding: Literal["same", "valid"] = "same"
    norm: Literal["none", "batch", "group"] = "batch"
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "mish", "pysilu"] = "relu"
    upsampling: Literal["transpose", "bilinear"] = "transpose"
    dropout: float = 0.0


@dataclass
class TrainingConfig:
    """How the network is trained. Budgets are steps, never seconds, so that a run can be repeated exactly.

    Attributes:
        epochs: how often the network is validated and a checkpoint is written.
        steps_per_epoch: optimiser steps between two validations; null means one pass over the training images.
        batch_size: patches per step, over all processes together.
        learning_rate: peak learning rate of AdamW.
        weight_decay: of AdamW.
        warmup: share of all steps during which the learning rate rises linearly; afterwards it falls along a cosine to 0.
        clip_norm: largest norm of the gradient; 0 does not clip.
        ema_decay: weights are averaged over time with this decay and the average is what is validated and saved;
            0 does not average.
        dice_weight: weight of the soft Dice loss beside the cross-entropy, whose weight is 1.
        precision: `auto` takes bf16 or fp16 where the device computes in it natively, fp32 elsewhere.
        device: `auto` takes CUDA, then Apple's MPS, then the CPU.
        workers: processes that prepare data beside the training; the result does not depend on it.
        keep_every_epoch: also keep each epoch's weights, with a time stamp, in `state/`.
        tensorboard: also write the history for TensorBoard, in `state/tensorboard/`.
    """

    epochs: int = 10
    steps_per_epoch: int | None = 100
    batch_size: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    dice_weight: float = 0.5
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    workers: int = 0
    keep_every_epoch: bool = False
    tensorboard: bool = False


@dataclass
class Config:
    """Everything a run depends on, together with the data and the versions of the libraries.

    Attributes:
        seed: of the initial weights, the order of the images, augmentation and dropout.
        data: which images and labels, and how they are split.
        augmentation: what happens to a training image on its way into the network.
        model: which network.
        training: how it is trained.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


SECTIONS = {"data": DataConfig, "augmentation": AugmentationConfig, "model": ModelConfig, "training": TrainingConfig}


def check_config(config: Config) -> None:
    """Check the ranges that types cannot express.

    Raises:
        UserError: for the first setting that is out of range.
    """
    data, augmentation, model, training = config.data, config.augmentation, config.model, config.training

    def need(condition: bool, setting: str, value: object, rule: str) -> None:
        if not condition:
            raise UserError(f"{setting} is {value}, but it must be {rule}.")

    for name in ("epochs", "batch_size"):
        need(getattr(training, name) >= 1, f"training.{name}", getattr(training, name), "at least 1")
    steps = training.steps_per_epoch
    need(
        steps is None or steps >= 1,
        "training.steps_per_epoch",
        steps,
        "at least 1, or null for one pass over the images",
    )
    need(
        0 < training.learning_rate < float("inf"), "training.learning_rate", training.learning_rate, "a positive number"
    )
    for name in ("weight_decay", "clip_norm", "dice_weight", "workers"):
        need(0 <= getattr(training, name) < float("inf"), f"training.{name}", getattr(training, name), "0 or more")
    for name in ("warmup", "ema_decay"):
        need(0 <= getattr(training, name) < 1, f"training.{name}", getattr(training, name), "at least 0 and below 1")
    need(config.seed >= 0, "seed", config.seed, "0 or more")

    need(augmentation.patch_size >= 1, "augmentation.patch_size", augmentation.patch_size, "at least 1 pixel")
    low, high = augmentation.scale
    need(
        0 < low <= high < float("inf"),
        "augmentation.scale",
        list(augmentation.scale),
        "two positive numbers, the smaller one first",
    )
    need(0 <= augmentation.rotation <= 180, "augmentation.rotation", augmentation.rotation, "between 0 and 180 degrees")
    for name in ("elastic", "brightness", "contrast", "gamma", "noise"):
        value = getattr(augmentation, name)
        need(0 <= value <= 1, f"augmentation.{name}", value, "between 0 and 1")

    for name in ("val_share", "test_share"):
        need(0 < getattr(data, name) < 1, f"data.{name}", getattr(data, name), "between 0 and 1")
    need(data.folds == 0 or data.folds >= 2, "data.folds", data.folds, "0 (one split) or at least 2")
    need(
        data.folds == 0 or 0 <= data.fold < data.folds,
        "data.fold",
        data.fold,
        f"from 0 to {data.folds - 1}, as data.folds is {data.folds}",
    )
    need(data.split_seed >= 0, "data.split_seed", data.split_seed, "0 or more")
    need(
        all(n >= 1 for n in data.sample_images),
        "data.sample_images",
        list(data.sample_images),
        "three numbers of at least 1",
    )
    need(data.sample_size >= 32, "data.sample_size", data.sample_size, "at least 32 pixels")

    need(model.num_classes >= 1, "model.num_classes", model.num_classes, "1 (binary) or the number of classes")
    need(model.in_channels == 3, "model.in_channels", model.in_channels, "3, because images are read as RGB")
    need(
        len(model.widths) >= 1 and min(model.widths) >= 1,
        "model.widths",
        list(model.widths),
        "one positive number a level",
    )
    need(0 <= model.dropout < 1, "model.dropout", model.dropout, "at least 0 and below 1")


def to_dict(config: Config) -> dict:
    """The configuration as nested dictionaries and lists, as YAML and JSON hold it."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def from_dict(settings: dict, source: str) -> Config:
    """Build a checked configuration from nested dictionaries; settings left out take their defaults.

    Raises:
        UserError: for an unknown key, a wrong type or a value out of range; `source` says where it came from.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        for key in settings:
            if key != "seed" and key not in SECTIONS:
                raise UserError(f"`{key}` is no setting; there are seed, {', '.join(SECTIONS)}.")
        for section in SECTIONS:
            if not isinstance(settings.get(section, {}), dict):
                raise UserError(f"`{section}` must hold settings of the form `name: value`.")
        return from_parsed(parser.parse_object(settings).as_dict())
    except (ArgumentError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error


def from_parsed(values: dict) -> Config:
    """Build and check a configuration from nested dictionaries whose types are already right."""
    sections = {name: cls(**values[name]) for name, cls in SECTIONS.items()}
    config = Config(seed=values["seed"], **sections)
    check_config(config)
    return config


def load_config(path: Path | str) -> Config:
    """Read a YAML file. Nothing in it is executed.

    Raises:
        UserError: if it is missing, is not YAML, or holds a wrong setting.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such settings file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: must hold settings of the form `name: value`, see `python -m unet_helpers train --help`."
        )
    return from_dict(settings, str(path))


def dump_config(config: Config) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def one_line(error: BaseException | str) -> str:
    """An error's message on one line of readable length."""
    return " ".join(str(error).split())[:400]
