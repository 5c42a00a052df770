"""From an image to a probability for every pixel, and from image files to masks on the disk.

Borders are mirrored where convolutions eat them, large images go tile by tile, mirror images are averaged.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from unet_helpers.catalogue import MEANINGS, class_names
from unet_helpers.config import DataConfig, Flips, UserError
from unet_helpers.datasets import find_meaning, wanted_meaning
from unet_helpers.images import decode_mask, is_coloured, list_images, normalise, read_image, read_mask_values, shrink
from unet_helpers.metrics import level, probabilities, quantise
from unet_helpers.pairing import pair_by_name
from unet_helpers.plots import animate, class_handles, colour_classes, error_map, to_png
from unet_helpers.runs import Run, load_run
from unet_helpers.system import find_device, make_folder, write_whole

TILE = 1536  # images with a longer side are predicted tile by tile, which bounds the memory needed


@torch.inference_mode()
def predict_probabilities(
    model: nn.Module, image: Tensor, flips: Flips = True, tile: int = TILE, size: tuple[int, int] | None = None
) -> Tensor:
    """Probabilities for an image, float32 (C, H, W), of any size, normalised as in training, on the model's device.

    The model is in evaluation mode. `flips` averages over the image and its three mirror images, or its `horizontal`
    one (test-time augmentation); at most `tile` pixels a side go through the network at once. Returns float32 (H, W),
    by sigmoid, or (K, H, W), by softmax, interpolated linearly to `size`, by default the image's own. Outside the field
    of view background is certain.
    """
    axes = [(), (-1,), (-2,), (-2, -1)][: {True: 4, "horizontal": 2, False: 1}[flips]]
    views = (probabilities(predict_logits(model, image.flip(dims)[None], tile))[0].flip(dims) for dims in axes)
    probability = sum(views) / len(axes)
    outside = (image == 0).all(0)  # as `images.normalise` leaves it; nothing there was ever trained on
    probability[..., outside] = 0
    if probability.ndim == 3:
        probability[0, outside] = 1
    if size is None or tuple(size) == tuple(image.shape[-2:]):
        return probability
    channels = probability.reshape(1, -1, *image.shape[-2:])
    larger = functional.interpolate(channels, tuple(size), mode="bilinear").clamp(0, 1)
    return larger.reshape(*probability.shape[:-2], *size)


def predict_logits(model: nn.Module, images: Tensor, tile: int = TILE) -> Tensor:
    """Logits (B, K, H, W) for images (B, C, H, W) of any size; a border that valid convolutions eat is mirrored.

    Larger images are cut into tiles, of which only the middle is kept (the overlap-tile strategy, Ronneberger et al.
    2015, figure 2). As their margin is as wide as the network's receptive field reaches, there are no seams.
    """
    height, width = images.shape[-2:]
    if max(height, width) <= tile:
        return forward_whole(model, images)
    margin = math.ceil(model.receptive_field_radius / model.stride) * model.stride
    core = max(tile - 2 * margin, model.stride) // model.stride * model.stride  # tiles start on the pooling grid
    rows = []
    for top in range(0, height, core):
        row = []
        for left in range(0, width, core):
            y0, x0 = max(top - margin, 0), max(left - margin, 0)
            y1, x1 = min(top + core + margin, height), min(left + core + margin, width)
            logits = forward_whole(model, images[..., y0:y1, x0:x1])
            row.append(logits[..., top - y0 : top - y0 + core, left - x0 : left - x0 + core])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def forward_whole(model: nn.Module, images: Tensor) -> Tensor:
    """Logits at the size of the images; for valid convolutions the image is first continued by mirroring."""
    images = images.contiguous(memory_format=torch.channels_last)
    if not model.border:
        return model(images).float()
    height, width = images.shape[-2:]
    # What is left over comes last, so that every image and every tile starts on the same pooling grid.
    below, right = (model.valid_input_size(side) - side - model.border for side in (height, width))
    logits = model(mirror_border(images, model.border, right, model.border, below))
    return logits[..., :height, :width].float()


def mirror_border(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Continue images (B, C, H, W) beyond their border by mirroring, as often as the border's width asks for."""
    height, width = images.shape[-2:]
    rows = torch.from_numpy(np.pad(np.arange(height), (top, bottom), mode="reflect"))  # torch's own mirrors only once
    columns = torch.from_numpy(np.pad(np.arange(width), (left, right), mode="reflect"))
    return images[..., rows, :][..., columns]


def predict(
    run: Path | str,
    paths: list[Path | str],
    output: Path | str,
    flips: bool = True,
    device: str = "auto",
    truth: Path | str | None = None,
    gif: bool = False,
    quiet: bool = False,
) -> list[Path]:
    """Predict images and write, for each, `<stem>_mask.png` and `<stem>_probability.png` (16 bit).

    A binary mask holds 0 and 255, or the two colours of the masks trained on. With several classes it holds class
    indices, shown in the colours of the masks trained on if those were in colours, `<stem>_color.png` shows them in
    colours, which `legend.png` explains, and the probability is that of the class chosen. `paths` are image files or
    folders of them; `output` is made if need be; `flips` averages over the mirror images that training has shown. With
    `truth`, a mask or a folder of masks of these names, `<stem>_errors.png` is written, too, and with `gif` a
    `<stem>.gif` of image, probability and mask in turn; `quiet` shows no progress. Returns the paths of the masks;
    raises `UserError`, before anything is written, if input or output cannot be used.
    """
    images = find_inputs(paths)
    folders = {os.path.dirname(os.path.realpath(path)) for path in [*images, *([truth] if truth else [])]}
    if os.path.realpath(output) in folders | {os.path.realpath(truth or images[0])}:
        raise UserError(f"{output}: holds images or masks that predictions could overwrite: name another output.")
    opened, target = load_run(run), find_device(device)
    config = opened.config
    meaning = MEANINGS.get(config.data.name) or wanted_meaning(config.data)
    truths = find_truths(images, truth, meaning) if truth else {}
    for path in images:  # look at every input before the first output
        size = read_image(path).shape[:2]
        if path in truths and truths[path].shape != size:
            raise UserError(f"{path}: its ground truth has another size, {truths[path].shape} instead of {size}.")
    output = make_folder(Path(output))
    model = opened.model.to(target, memory_format=torch.channels_last)
    flips = flips and config.augmentation.flips
    if config.model.num_classes > 1:
        names = class_names(config.data, config.model.num_classes)
        legend = Figure(figsize=(2.5, 0.3 + 0.25 * len(names)))
        legend.legend(handles=class_handles(names), loc="center", frameon=False)
        write_whole(output / "legend.png", to_png(legend))
    for path in tqdm(images, desc="predict", unit="image", disable=quiet):
        image = read_image(path)
        probability = predict_image(model, image, target, flips, config.data).cpu()
        mask, files = render(probability, opened)
        if path in truths:
            files["_errors.png"] = to_png(error_map(mask, truths[path]))
        if gif:
            files[".gif"] = animate(frames(image, probability, mask))
        for ending, content in files.items():
            write_whole(output / (path.stem + ending), content)
    return [output / f"{path.stem}_mask.png" for path in images]


def predict_image(
    model: nn.Module, image: np.ndarray, device: torch.device, flips: Flips = True, data: DataConfig | None = None
) -> Tensor:
    """`predict_probabilities` of a picture, see `read_image`, at its size, prepared as `data` or its defaults say."""
    data = data or DataConfig()
    normalised = normalise(shrink(image, data.longest_side), kind=data.normalisation).transpose(2, 0, 1).copy()
    return predict_probabilities(model, torch.from_numpy(normalised).to(device), flips, size=image.shape[:2])


def render(probability: Tensor, run: Run) -> tuple[np.ndarray, dict[str, bytes]]:
    """Class indices uint8 (H, W), and the files that show a prediction, as bytes by ending."""
    palette = run.config.data.palette
    if probability.ndim == 2:
        levels = quantise(probability).numpy()
        classes = (levels >= level(run.threshold)).astype(np.uint8)
        files = {"_mask.png": to_png(classes, palette) if palette else to_png(classes * 255)}
    else:
        best, chosen = probability.max(0)
        levels, classes = quantise(best).numpy(), chosen.numpy().astype(np.uint8)
        files = {"_mask.png": to_png(classes, palette), "_color.png": to_png(colour_classes(classes, len(probability)))}
    return classes, files | {"_probability.png": to_png(levels.astype(np.uint16))}


def frames(image: np.ndarray, probability: Tensor, classes: np.ndarray) -> list[np.ndarray]:
    """Image, probability and mask as pictures uint8 (H, W, 3)."""
    photo = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
    mask = np.stack([classes * 255] * 3, -1)
    if probability.ndim == 3:
        mask, probability = colour_classes(classes, len(probability)), probability.amax(0)
    return [photo, np.stack([(probability.numpy() * 255).round().astype(np.uint8)] * 3, -1), mask]


def find_inputs(paths: list[Path | str]) -> list[Path]:
    """The image files among files and folders; two of one stem would overwrite each other's predictions."""
    images = [image for path in map(Path, paths) for image in (list_images(path) if path.is_dir() else [path])]
    stems = {}
    for path in images:
        if (other := stems.setdefault(path.stem, path)) is not path:
            raise UserError(f"{path}: its predictions would overwrite those of {other}; predict them apart.")
    return images


def find_truths(images: list[Path], truth: Path | str, meaning="auto") -> dict[Path, np.ndarray]:
    """Masks (H, W) for the images, found by name as in a folder data set; `meaning` as in `decode_mask`, or `auto`."""
    truth = Path(truth)
    if not truth.is_dir() and len(images) > 1:
        raise UserError(f"{truth}: this is one mask for {len(images)} images; name a folder of masks.")
    masks = pair_by_name(images, list_images(truth)) if truth.is_dir() else {images[0]: truth}
    meaning = find_meaning(list(masks.values()), meaning)
    return {path: decode_mask(read_mask_values(mask, is_coloured(meaning)), meaning) for path, mask in masks.items()}
