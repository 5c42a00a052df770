"""The old way of augmenting: write every training image four times to disk, then train on those files and no others.

The original, a horizontal flip, a vertical flip and a rotation turn DRIVE's 20 training images into 80. It is here to
be compared with augmentation on the fly, which never shows the same patch twice. Copies are named
`<original>__<change>`, and the folder data set keeps them in their original's group; drawn at random instead, nearly
every validation image would have a copy among the training images.
"""

import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from unet_helpers.config import IGNORE, DataConfig, UserError
from unet_helpers.datasets import Sample, find_samples, load_sample

MAX_ANGLE = 45.0  # degrees


def expand_offline(config: DataConfig, output: Path | str, seed: int = 0) -> str:
    """Write a data set four times as large as `{train,test}/{image,mask}`, all PNG; test images once, unchanged.

    Training and validation images both go to `train`: train on it with `data.name=folder` and `data.val_share=0.15`,
    and 3 of DRIVE's 20 originals with all their copies validate, 12 of 80. Masks hold class indices and 255.

    Args:
        config: the data set to start from.
        output: folder to write, which must not exist yet or be empty; written whole or not at all.
        seed: of the angles of rotation.

    Returns:
        One line saying what was written.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is in the way: name a folder that is empty or does not exist yet")
    samples = find_samples(config)
    part = output.with_name(f".{output.name}.{os.getpid()}")
    rng = np.random.default_rng(seed)
    counts = {"train": 0, "test": 0}
    try:
        for split in counts:
            for kind in ("image", "mask"):
                (part / split / kind).mkdir(parents=True)
        for sample in samples:
            split = "test" if sample.split == "test" else "train"
            image, mask = load_sample(sample)
            if image.dtype != np.uint8:
                image = (image * 255).round().astype(np.uint8)
            copies = (
                _copies(image, mask, rng.uniform(-MAX_ANGLE, MAX_ANGLE)) if split == "train" else {"": (image, mask)}
            )
            for change, (copied_image, copied_mask) in copies.items():
                for kind, picture in (("image", copied_image), ("mask", copied_mask)):
                    Image.fromarray(picture).save(part / split / kind / f"{_stem(sample)}{change}.png")
                counts[split] += 1
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}): name another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{output}: {counts['train']} training images (each original four times), {counts['test']} test images"


def _copies(image: np.ndarray, mask: np.ndarray, angle: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The original and its three changed copies by the ending of their names."""
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    return {
        "": (image, mask),
        "__hflip": (image[:, ::-1], mask[:, ::-1]),
        "__vflip": (image[::-1], mask[::-1]),
        "__rotated": (
            cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR),
            cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE),
        ),
    }


def _stem(sample: Sample) -> str:
    """A file name whose part before the first `__` is the sample's group."""
    name, group = (re.sub(r"[/_]+", "_", text) for text in (sample.name, sample.group))
    return name if group.endswith(name) else f"{group}__{name}"
