"""Random changes to a training image while it is on its way into the network: no two epochs show the same picture.

Geometry comes first, in one interpolation from the whole image into the patch; then flips, light and noise. Mask and
field of view take the nearest neighbour, so that no class index is invented; outside the image they are 255 and False.
"""

import math
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it contacts the package index

import albumentations as A
import cv2

from unet_helpers.config import IGNORE, AugmentationConfig

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

cv2.setNumThreads(0)  # a patch is too small to share between threads; loader workers run side by side instead


class RandomPatch(A.DualTransform):
    """Cut a patch of `size` (height, width) around a random point: rotated, scaled and deformed in one interpolation.

    The centre lies anywhere in the image, so a pixel at the edge is seen half as often as one in the middle; patches
    inside the image would almost never show it. Only along a side where the patch is as large as the image, or larger,
    all of that side stays in it. Elastic deformation as in Ronneberger et al. 2015, section 3.1: random displacements
    on a 3 x 3 grid, interpolated bicubically, of standard deviation 10 · patch size / 512.
    """

    def __init__(self, size: tuple[int, int], rotation: float, scale: tuple[float, float], elastic: float):
        super().__init__(p=1.0)
        self.size, self.rotation, self.scale, self.elastic = size, rotation, scale, elastic

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw where the patch lies: the affine matrix that maps patch to image, and for elastic ones a map."""
        rng, sides = self.random_generator, self.size[::-1]
        middle, centre = [(side - 1) / 2 for side in sides], []
        for length, side in zip(params["shape"][1::-1], sides, strict=True):
            first, last = (0, length) if side < length else (length - 1 - side // 2, (side + 1) // 2)
            # On a pixel (odd size) or between pixels (even size): without rotation or scale nothing is blurred.
            centre.append(math.floor(rng.uniform(first, last)) + (side - 1) / 2 % 1)
        angle = math.radians(rng.uniform(-self.rotation, self.rotation))
        magnification = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        cosine, sine = math.cos(angle) / magnification, math.sin(angle) / magnification
        matrix = np.array([[cosine, -sine, 0], [sine, cosine, 0]])
        matrix[:, 2] = centre - matrix[:, :2] @ middle
        grid = rng.normal(0, 10 * np.array(sides) / 512, (3, 3, 2)) if rng.random() < self.elastic else None
        return {"matrix": matrix, "grid": grid}

    def apply_to_mask(self, mask: np.ndarray, **params: Any) -> np.ndarray:
        """Mask (or field of view as 0/1) to patch, by nearest neighbour, 255 outside."""
        return self.apply(mask, interpolation=cv2.INTER_NEAREST, fill=IGNORE, **params)

    def apply(self, img: np.ndarray, matrix, grid, interpolation=cv2.INTER_LINEAR, fill=0, **params: Any) -> np.ndarray:
        """Photograph to patch, linearly, 0 outside."""
        # Only the window around the patch goes to OpenCV, which refuses empty ones and sides of over 32767 pixels.
        height, width = self.size
        corners = matrix @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])
        margin = 2 + (0 if grid is None else math.ceil(1.5 * np.abs(grid).max()))
        left, top = np.clip(np.floor(corners.min(axis=1)).astype(int) - margin, 0, np.array(img.shape[1::-1]) - 1)
        right, bottom = np.maximum(1, np.ceil(corners.max(axis=1)).astype(int) + margin)
        window = np.ascontiguousarray(img[top:bottom, left:right])
        matrix = matrix - [[0, 0, left], [0, 0, top]]
        options, size = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": (fill,) * 4}, (width, height)
        if grid is None:
            return cv2.warpAffine(window, matrix, size, flags=interpolation | cv2.WARP_INVERSE_MAP, **options)
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        straight = [a * columns + b * rows + c for a, b, c in matrix]
        moved = cv2.resize(grid.astype(np.float32), size, interpolation=cv2.INTER_CUBIC) + np.stack(straight, axis=-1)
        return cv2.remap(window, moved.astype(np.float32), None, interpolation, **options)


# Normalising takes out what a whole picture shares; light and colour also differ from place to place within one.
class ChannelLight(A.ImageOnlyTransform):
    """Change brightness (an offset) and contrast (a gain) of each colour channel on its own."""

    def __init__(self, brightness: float, contrast: float):
        super().__init__(p=1.0)
        self.brightness, self.contrast = brightness, contrast

    def get_params(self) -> dict[str, Any]:
        """Draw gain and offset of each channel."""
        gain = self.random_generator.uniform(1 - self.contrast, 1 + self.contrast, 3)
        return {"gain": gain, "offset": self.random_generator.uniform(-self.brightness, self.brightness, 3)}

    def apply(self, img: np.ndarray, gain: np.ndarray, offset: np.ndarray, **params: Any) -> np.ndarray:
        """Photograph uint8, or float32 in 0..1, to the same."""
        if img.dtype == np.uint8:
            table = np.arange(256)[:, None] * gain + 255 * offset
            return cv2.LUT(img, table.round().clip(0, 255).astype(np.uint8)[None])
        return (img * gain + offset).clip(0, 1).astype(np.float32)


def make_augmentation(config: AugmentationConfig) -> Callable[..., Arrays]:
    """Build the augmentation that `config` describes.

    It is a function, which can be pickled, of (image, mask, view, seed): image uint8 (H, W, 3), or float32 in 0..1;
    mask uint8 (H, W); view bool (H, W), the field of view; seed an integer or a sequence of integers. It returns the
    three as patches of `config.patch_size`, same types; the same seed gives the same patch, in any process.
    """
    size = tuple(np.broadcast_to(config.patch_size, 2).tolist())
    steps: list[A.BasicTransform] = [RandomPatch(size, config.rotation, config.scale, config.elastic)]
    steps += [A.HorizontalFlip(p=0.5)] * bool(config.flips) + [A.VerticalFlip(p=0.5)] * (config.flips is True)
    if config.gamma:
        steps.append(A.RandomGamma((100 * (1 - config.gamma), 100 * (1 + config.gamma)), p=1.0))
    if config.brightness or config.contrast:
        steps.append(ChannelLight(config.brightness, config.contrast))
    if config.noise:
        steps.append(A.GaussNoise((0.0, config.noise), p=1.0))
    return partial(_augment, A.Compose(steps, additional_targets={"view": "mask"}))


def _augment(pipeline: A.Compose, image: np.ndarray, mask: np.ndarray, view: np.ndarray, seed) -> Arrays:
    rng = np.random.default_rng(seed)
    # One stream for all steps: `set_random_seed` starts each at the same number, and both flips would fall together.
    pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    patch = pipeline(image=image, mask=mask, view=view.view(np.uint8))
    return patch["image"], patch["mask"], patch["view"] == 1
