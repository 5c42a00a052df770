"""Every setting of a run: what `config.yaml` holds, the command line offers and notebooks use.

`check_config` checks them once, before anything is read or written; each setting's docstring is its `--help`.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args, get_type_hints

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
        name: `sample` (built-in synthetic retinas), a public set, or `folder` (your own images and masks).
        root: the folder below which the data lies, at any depth; unused by `sample`.
        labels: for `sample`: `vessels` (binary) or `artery_vein` (0 background, 1 artery, 2 vein).
        mask_values: for `folder`: `binary` (not 0: foreground), `classes` (255: ignore), `colours`; `auto`: found out.
        palette: for `folder`: the colours of the masks, `#rrggbb`, in the order of the classes; null: found out.
        group_pattern: for `folder`: regular expression; stems of equal first group (default: up to `__`) stay together.
        longest_side: larger images are reduced to it before the network sees them; scores are at native size.
        normalisation: `image` by each image's own mean and deviation, `imagenet` by ImageNet's, `none` to 0..1 only.
        train_limit: train on so many images only, drawn by `seed`; null: on all.
        val_share: share of the groups kept for validation; from 2 on, their number.
        test_share: the same for testing, where the data set does not bring its own test images.
        folds: number of folds for cross-validation; 0 splits once, by `val_share`.
        fold: with `folds`: which fold validates, from 0.
        split_seed: seed of the split.
        sample_images: for `sample`: how many images for training, validation and testing.
        sample_size: for `sample`: height and width of an image in pixels.
    """

    name: Literal["sample", "drive", "rite", "carvana", "camvid", "nyuv2-13", "nyuv2-40", "folder"] = "sample"
    root: str = "data"
    labels: Literal["vessels", "artery_vein"] = "vessels"
    mask_values: Literal["auto", "binary", "classes", "colours"] = "auto"
    palette: tuple[str, ...] | None = None
    group_pattern: str = r"(.+?)(?:__.+)?$"
    longest_side: int | None = None
    normalisation: Literal["image", "imagenet", "none"] = "image"
    train_limit: int | None = None
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
        patch_size: side in pixels of the patches the network is trained on, or `[height, width]`.
        flips: mirror both ways, each half of the time, or only `horizontal`; predictions are averaged over the same.
        rotation: largest angle in degrees, either way.
        scale: smallest and largest magnification.
        elastic: share of the patches (0 to 1) that are also deformed elastically.
        brightness: largest change, as a share of full scale.
        contrast: largest change of the gain (0.2: between 0.8 and 1.2).
        gamma: largest change of the exponent (0.2: between 0.8 and 1.2).
        noise: largest standard deviation of Gaussian noise, as a share of full scale.
    """

    patch_size: int | tuple[int, int] = 128
    flips: bool | Literal["horizontal"] = True
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
        encoder_weights: for the latter: `imagenet` (downloaded), a weights file (or a run's), or null for random ones.
        full_resolution_skip: for its `Unet`: add the skip connection at full size, which its encoders leave out.
        weights: a run's `model.safetensors`, from which the whole network starts; null: from random weights.
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
    full_resolution_skip: bool = False
    weights: str | None = None
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
        encoder_rate: learning rate of an encoder of segmentation_models_pytorch, as a multiple of the others'.
        encoder_frozen: share of all steps during which such an encoder's weights stay as they are.
        weight_decay: of AdamW.
        warmup: share of all steps during which the learning rate rises linearly; then it falls along a cosine to 0.
        clip_norm: largest norm of the gradient; 0 does not clip.
        ema_decay: weights are averaged over time with this decay, and the average is what is saved; 0: as they are.
        dice_weight: weight of the soft Dice loss beside the cross-entropy, whose weight is 1.
        class_weights: weight of each class's pixels in the cross-entropy; null: 1 for all.
        precision: `auto` takes bf16 or fp16 where the device computes in it natively, fp32 elsewhere.
        device: `auto` takes CUDA, then Apple's MPS, then the CPU.
        workers: processes that prepare data beside the training; the result does not depend on it.
        keep_every_epoch: also keep each epoch's weights, with a time stamp, in `state/`.
        tensorboard: also write the history for TensorBoard, in `state/tensorboard/`.
    """

    epochs: int = 10
    steps_per_epoch: int | None = 80
    batch_size: int = 8
    learning_rate: float = 3e-3
    encoder_rate: float = 1.0
    encoder_frozen: float = 0.0
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    dice_weight: float = 0.5
    class_weights: tuple[float, ...] | None = None
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
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


SECTIONS = {"data": DataConfig, "augmentation": AugmentationConfig, "model": ModelConfig, "training": TrainingConfig}

# What types cannot express: settings, when a value x of theirs is right, and how to say so.
RULES = [
    ("training.epochs training.batch_size", lambda x: x >= 1, "at least 1"),
    ("augmentation.patch_size", lambda x: min(x if isinstance(x, tuple) else [x]) >= 1, "at least 1 pixel a side"),
    ("seed data.split_seed training.workers", lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"),
    ("training.weight_decay training.clip_norm", lambda x: 0 <= x < math.inf, "0 or more"),
    ("data.val_share data.test_share", lambda x: 0 <= x < 1 or (x > 1 and x % 1 == 0), "below 1, or a number above"),
    ("data.train_limit training.steps_per_epoch", lambda x: x >= 1, "at least 1, or null to take all images"),
    ("training.dice_weight training.encoder_rate", lambda x: 0 <= x < math.inf, "0 or more"),
    ("data.longest_side", lambda x: x >= 32, "at least 32 pixels, or null for native size"),
    ("training.warmup training.ema_decay model.dropout", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("augmentation.brightness augmentation.contrast", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("augmentation.elastic augmentation.noise training.encoder_frozen", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("augmentation.gamma", lambda x: 0 <= x <= 0.99, "between 0 and 0.99"),
    ("augmentation.rotation", lambda x: 0 <= x <= 180, "between 0 and 180 degrees"),
    ("augmentation.scale", lambda x: 0 < x[0] <= x[1] < math.inf, "two positive numbers, the smaller one first"),
    ("training.learning_rate", lambda x: 0 < x < math.inf, "a positive number"),
    ("data.root", bool, "a folder"),
    ("data.palette", lambda x: re.fullmatch("(#[0-9a-f]{6} )+", " ".join([*x, ""])), "like '#00ff7f', or null"),
    ("data.palette", lambda x: len(set(x)) == len(x) <= 254, "at most 254 colours, each once, or null"),
    ("data.folds", lambda x: x == 0 or x >= 2, "0 (one split) or at least 2"),
    ("data.sample_images", lambda x: min(x) >= 1, "three numbers of at least 1"),
    ("data.sample_size", lambda x: x >= 32, "at least 32 pixels"),
    ("model.num_classes", lambda x: x >= 1, "1 (binary) or the number of classes"),
    ("model.in_channels", lambda x: x == 3, "3, because images are read as RGB"),
    ("model.widths", lambda x: len(x) >= 1 and min(x) >= 1, "one positive number a level"),
]


def need(condition: bool, setting: str, value: object, rule: str) -> None:
    """Raise `UserError` unless the condition holds."""
    if not condition:
        shown = str(list(value) if isinstance(value, tuple) else value)
        raise UserError(f"{setting} is {shown[:100]}{'...' * (len(shown) > 100)}, but it must be {rule}.")


def check_config(config: Config) -> None:
    """Check `RULES`; raise `UserError` for the first setting that is out of range, or null where it may not be."""
    for section, cls in SECTIONS.items():
        for name, kind in get_type_hints(cls).items():
            given = getattr(getattr(config, section), name) is not None or type(None) in get_args(kind)
            need(given, f"{section}.{name}", "null", "given: leave the line out for the default")
    for settings, is_right, rule in RULES:
        for setting in settings.split():
            value = attrgetter(setting)(config)
            need("null" in rule if value is None else is_right(value), setting, value, rule)
    folds, fold = config.data.folds, config.data.fold
    need(folds == 0 or 0 <= fold < folds, "data.fold", fold, f"from 0 to {folds - 1}, as data.folds is {folds}")
    weights, count = config.training.class_weights, max(2, config.model.num_classes)
    right = weights is None or (len(weights) == count and min(weights) >= 0 and 0 < sum(weights) < math.inf)
    need(right, "training.class_weights", weights, f"{count} numbers of at least 0, not all 0, or null")
    if config.model.architecture == "unet":
        for setting in ("model.encoder_weights", "training.encoder_rate", "training.encoder_frozen"):
            value, default = attrgetter(setting)(config), attrgetter(setting)(Config())
            need(value == default, setting, value, f"{json.dumps(default)} for `unet`, which has no such encoder")
    right = config.model.architecture == "Unet" or not config.model.full_resolution_skip
    need(right, "model.full_resolution_skip", True, "false except for `Unet`")


def to_dict(config: Config) -> dict:
    """The configuration as nested dictionaries and lists, as YAML and JSON hold it."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(settings: object, source: str) -> Config:
    """Build a checked configuration from nested dictionaries; settings left out take their defaults.

    `UserError` begins with `source` and names an unknown key, a wrong type or a value out of range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        if not isinstance(settings, dict):
            raise UserError("must hold settings of the form `name: value`, as a run's config.yaml does.")
        for key, value in settings.items():
            if key != "seed" and key not in SECTIONS:
                raise UserError(f"`{key}` is no setting; there are seed, {', '.join(SECTIONS)}.")
            if key != "seed" and not isinstance(value, dict):
                raise UserError(f"`{key}` must hold settings of the form `name: value`.")
            # Not left to jsonargparse, which imports what a `class_path` names before it refuses it.
            if key != "seed" and (unknown := [name for name in value if name not in vars(SECTIONS[key]())]):
                raise UserError(f"`{key}.{unknown[0]}` is no setting; see `python -m unet_helpers train --help`.")
        return from_parsed(parser.parse_object(settings).as_dict())
    except (ArgumentError, LookupError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{source}: {explain(str(error))}") from error


def explain(message: str) -> str:
    """What jsonargparse says about a setting of a wrong type, in one line and plainer words."""
    found = re.match(r'Parser key "(\w+)\.(\w+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if not found:
        return one_line(re.sub(r"Parser key |<class |'>|typing\.", "", message))
    kind = re.sub(r"<class '|'>|typing\.|Literal|Union", "", str(get_type_hints(SECTIONS[found[1]])[found[2]]))
    return one_line(f"{found[1]}.{found[2]} is {found[3]}, but it must be {kind}.")


def from_parsed(values: dict) -> Config:
    """Build and check a configuration from nested dictionaries whose types are already right."""
    config = Config(values["seed"], **{name: cls(**values[name]) for name, cls in SECTIONS.items()})
    check_config(config)
    return config


def load_config(path: Path | str) -> Config:
    """Read a YAML file of settings; raise `UserError` if it is missing, no YAML, or a setting is wrong."""
    return from_dict(read_yaml(path), str(path))


class _Loader(yaml.SafeLoader):
    """Plain data only; refuses what PyYAML lets through: a key given twice, and aliases that unfold to gigabytes."""

    nodes = 0

    def compose_node(self, parent, index):
        before, alias = self.nodes, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.nodes += getattr(node, "size", math.inf) if alias else 1  # an alias within what it stands for has no end
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) and not alias else []
        twice = [key for key, count in Counter(key for key in keys if isinstance(key, str)).items() if count > 1]
        if twice or self.nodes > 100_000:
            what = f"the key {twice[0]} is given twice" if twice else "too long, or *aliases unfold to too much"
            raise yaml.composer.ComposerError(None, None, what, node.start_mark)
        node.size = node.size if alias else self.nodes - before
        return node


def read_yaml(path: Path | str) -> object:
    """Load a YAML file, executing nothing in it; raise `UserError` if it is missing or no YAML."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such settings file.") from None
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = "it is nested too deeply." if isinstance(error, RecursionError) else one_line(error)
        raise UserError(f"{path}: cannot be read as YAML: {reason}") from error


def dump_config(config: Config) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def one_line(error: BaseException | str) -> str:
    """An error's message on one line of readable length."""
    return " ".join(str(error).split())[:400]
