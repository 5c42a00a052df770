"""From an image to a probability for every pixel, and from image files to masks on the disk."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tifffile import imwrite
from torch import Tensor, nn
from tqdm import tqdm

from unet_helpers import images
from unet_helpers.catalogue import MEANINGS, class_names
from unet_helpers.config import Config, DataConfig, UserError
from unet_helpers.datasets import find_meaning, wanted_meaning
from unet_helpers.images import LARGE, STRIP
from unet_helpers.metrics import level, probabilities, quantise
from unet_helpers.model import forward_whole
from unet_helpers.pairing import pair_by_name
from unet_helpers.plots import animate, class_handles, colour_classes, error_map, to_png
from unet_helpers.runs import Run, load_run
from unet_helpers.system import find_device, let_go, make_folder, on_disk, whole_file, write_whole

TILE = 1536  # images with a longer side are predicted tile by tile, which bounds the memory needed
SAME_SIZE = 0.1  # a field of view whose diameter differs less than this from that in training is left as it is
# Views of an image that are averaged over: the axes that are mirrored, and whether the axes then change places.
MIRRORS = [(axes, False) for axes in ((), (-1,), (-2,), (-2, -1))]
TURNS = [MIRRORS[0], MIRRORS[3], ((-1,), True), ((-2,), True)]
VIEWS = {False: MIRRORS[:1], "horizontal": MIRRORS[:2], True: MIRRORS, "turns": TURNS}
VIEWS["all"] = [(axes, turned) for turned in (False, True) for axes, _ in MIRRORS]


def find_views(config: Config, flips: bool | str) -> bool | str:
    """Which `VIEWS` to average over: those that training has shown; `UserError` for `rotations` that it has not."""
    shown, angle = config.augmentation.flips, config.augmentation.rotation
    if flips == "rotations" and angle < (90 if shown is True else 180):  # both mirror images make a half turn
        raise UserError(f"--rotations: augmentation.rotation was {angle} in training, which is too small: drop it.")
    return ("all" if shown else "turns") if flips == "rotations" else flips and shown


@torch.inference_mode()
def predict_probabilities(model: nn.Module, image: Tensor, flips=True, tile: int = TILE, size=None) -> Tensor:
    """Probabilities for an image, float32 (C, H, W), of any size, normalised as in training, on the model's device.

    The model is in evaluation mode. `flips`, a key of `VIEWS`, says what is averaged over (test-time augmentation); at
    most `tile` pixels a side go through the network at once. If it knows a `view_diameter`, see `Run`, the image is
    scaled to that, and the probabilities back. Returns float32 (H, W), by sigmoid, or (K, H, W), by softmax, of `size`
    (height, width), by default the image's own; outside the field of view background is certain.
    """
    size = tuple(size or image.shape[-2:])
    factor = scale_of(model, (image != 0).any(0).cpu().numpy())
    if factor != 1:
        scaled = [max(1, round(side * factor)) for side in image.shape[-2:]]
        # On the CPU, as not every device can do this.
        image = nn.functional.interpolate(image.cpu()[None], scaled, mode="bilinear", antialias=True)[0].to(image)
    probability = average(model, image, flips, tile)
    if size == tuple(image.shape[-2:]):
        return probability
    planes = probability.reshape(1, -1, *image.shape[-2:])
    return nn.functional.interpolate(planes, size, mode="bilinear").clamp(0, 1).reshape(*probability.shape[:-2], *size)


def scale_of(model: nn.Module, view: np.ndarray) -> float:
    """By what the network wants a picture scaled, given its field of view, bool (H, W); 1 if that is `SAME_SIZE`."""
    wanted, diameter = getattr(model, "view_diameter", None), images.view_diameter(view)
    return 1.0 if not wanted or not diameter or abs(diameter / wanted - 1) <= SAME_SIZE else wanted / diameter


def average(model: nn.Module, image: Tensor, flips: bool | str, tile: int, rest: int = 0) -> Tensor:
    """Mean probability of the views of an image (C, H, W), but for the last `rest` rows, which mirror images leave out.

    So a strip's mirror image lies on the same pooling grid as in the mirror image of the whole picture.
    """
    total, end = 0, image.shape[-2] - rest
    for axes, turned in VIEWS[flips]:
        view = (image[:, :end] if -2 in axes else image).flip(axes)[None]
        seen = probabilities(predict_logits(model, view.mT if turned else view, tile))[0]
        total = total + (seen.mT if turned else seen).flip(axes)[..., :end, :]
    probability = total / len(VIEWS[flips])
    outside = (image == 0).all(0)[:end]  # as `images.normalise` leaves it; there the network sees nothing
    probability[..., outside] = 0
    if probability.ndim == 3:
        probability[0, outside] = 1
    return probability


def predict_logits(model: nn.Module, images: Tensor, tile: int = TILE) -> Tensor:
    """Logits (B, K, H, W) for images (B, C, H, W) of any size; a border that valid convolutions eat is mirrored.

    Larger images are cut into tiles, of which only the middle is kept (the overlap-tile strategy, Ronneberger et al.
    2015, figure 2); their margin, as wide as the network's receptive field reaches, leaves no seams.
    """
    height, width = images.shape[-2:]
    if max(height, width) <= tile:
        return forward_whole(model, images)
    margin, core = tiling(model, tile)
    high, wide = (side if side <= tile else core for side in (height, width))
    rows = []
    for top in range(0, height, high):
        row = []
        for left in range(0, width, wide):
            y, x = max(top - margin, 0), max(left - margin, 0)
            logits = forward_whole(model, images[..., y : top + high + margin, x : left + wide + margin])
            row.append(logits[..., top - y : top - y + high, left - x : left - x + wide])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def tiling(model: nn.Module, tile: int, spare: int = 0) -> tuple[int, int]:
    """Margin and core of tiles: the former as wide as the receptive field reaches; both on the pooling grid."""
    margin = math.ceil((model.receptive_field_radius + spare) / model.stride) * model.stride
    return margin, max(tile - 2 * margin, model.stride) // model.stride * model.stride


@torch.inference_mode()
def predict_strips(run: Run, picture: np.ndarray, device, flips: bool | str, min_size: int) -> Iterator:
    """Rows of a picture as large as the disk, and what `predict_image` and `drop_specks` give there, strip by strip.

    Where the network takes the picture smaller, it is reduced first and predicted as a whole; it is never enlarged.
    """
    model, data, small = run.model, run.config.data, None
    view, (height, width) = images.field_of_view(picture), picture.shape[:2]
    longest = max(height, width)
    side = min(data.longest_side or longest, longest)
    side = round(longest * scale_of(model, view)) if side == longest else side
    if side < longest:
        small = predict_image(model, images.shrink(picture, side), device, flips, data).cpu()
        y, x = ((torch.arange(count) * 2 + 1) / count - 1 for count in (height, width))  # from -1 to 1
    statistics = images.statistics_inside(picture, view)
    margin, core = tiling(model, STRIP, spare=model.stride)  # what `rest` takes away is less than a stride
    for rows in images.strips(picture.shape, core):
        let_go(picture)
        # A region of fewer than `min_size` pixels spans fewer rows.
        top, bottom = max(rows.start - min_size, 0), min(rows.stop + min_size, height)
        if small is not None:
            grid = torch.stack(torch.meshgrid(y[top:bottom], x, indexing="ij")[::-1], -1)[None]
            channels = small.reshape(1, -1, *small.shape[-2:])
            part = nn.functional.grid_sample(channels, grid, padding_mode="border", align_corners=False).clamp(0, 1)
            part = part.reshape(*small.shape[:-2], bottom - top, width)
        else:
            first, last = max(top - margin, 0) // model.stride * model.stride, min(bottom + margin, height)
            image = images.normalise(picture[first:last], view[first:last], statistics, data.normalisation)
            image = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(device)
            part = average(model, image, flips, STRIP, (last - height) % model.stride)
            part = part[..., top - first : bottom - first, :]
        yield rows, drop_specks(part, run.threshold, min_size)[..., rows.start - top : rows.stop - top, :]


def predict(
    run, paths: list, output, flips=True, device="auto", truth=None, gif=False, quiet=False, min_size=0, max_pixels=None
) -> list[Path]:
    """Predict image files, or folders of them, and write `<stem>_mask.png` and `<stem>_probability.png` (16 bit) each.

    A binary mask holds 0 and 255, or the two colours of the masks trained on. With several classes it holds class
    indices, in the colours of the masks trained on if they had any, `<stem>_color.png` shows them in the colours that
    `legend.png` explains, and the probability is that of the class chosen. `flips` averages over the mirror images that
    training has shown, "rotations" also over quarter turns; `min_size` as in `drop_specks`, `max_pixels` `open_image`.
    `truth`, a mask or a folder of masks of these names, adds `<stem>_errors.png`, and `gif` a `<stem>.gif` of image,
    probability and mask in turn. Pictures of more than `LARGE` pixels are predicted strip by strip and give tiled
    TIFFs. Returns the masks' paths; `UserError`, before anything is written, if input or output cannot be used.
    """
    inputs = find_inputs(paths)
    folders = {os.path.dirname(os.path.realpath(path)) for path in [*inputs, *([truth] if truth else [])]}
    if os.path.realpath(output) in folders | {os.path.realpath(truth or inputs[0])}:
        raise UserError(f"{output}: holds images or masks that predictions could overwrite: name another output.")
    opened, target = load_run(run), find_device(device)
    config = opened.config
    truths = find_truths(inputs, truth, MEANINGS.get(config.data.name) or wanted_meaning(config.data)) if truth else {}
    flips, large = find_views(config, flips), set()
    for path in inputs:  # look at every input before the first output
        size = images.open_image(path, max_pixels).shape[:2]
        large |= {path} if math.prod(size) > LARGE else set()
        if path in large and (truth or gif or min_size > STRIP):
            raise UserError(f"{path}: is too large for --truth, --gif and --min-size above {STRIP}: leave them out.")
        if path in truths and truths[path].shape != size:
            raise UserError(f"{path}: its ground truth has another size, {truths[path].shape} instead of {size}.")
    output = make_folder(Path(output))
    model = opened.model.to(target)
    if config.model.num_classes > 1:
        names = class_names(config.data, config.model.num_classes)
        legend = Figure(figsize=(2.5, 0.3 + 0.25 * len(names)))
        legend.legend(handles=class_handles(names), loc="center", frameon=False)
        write_whole(output / "legend.png", to_png(legend))
    for path in tqdm(inputs, desc="predict", unit="image", disable=quiet):
        image = images.open_image(path, max_pixels)
        if path in large:
            parts = predict_strips(opened, image, target, flips, min_size)
            write_large(output / path.stem, parts, image.shape[:2], opened)
            continue
        probability = predict_image(model, image, target, flips, config.data).cpu()
        probability = drop_specks(probability, opened.threshold, min_size)
        mask, files = render(probability, opened.threshold, config.data.palette)
        if path in truths:
            files["_errors.png"] = to_png(error_map(mask, truths[path]))
        if gif:
            files[".gif"] = animate(frames(image, probability, mask))
        for ending, content in files.items():
            write_whole(output / (path.stem + ending), content)
    return [output / f"{path.stem}_mask.{'tif' if path in large else 'png'}" for path in inputs]


def predict_image(model: nn.Module, image: np.ndarray, device, flips=True, data: DataConfig | None = None) -> Tensor:
    """`predict_probabilities` of a picture, see `read_image`, at its size, prepared as `data` or its defaults say."""
    data = data or DataConfig()
    normalised = images.normalise(images.shrink(image, data.longest_side), kind=data.normalisation)
    tensor = torch.from_numpy(normalised.transpose(2, 0, 1).copy()).to(device)
    return predict_probabilities(model, tensor, flips, size=image.shape[:2])


def classify(probability: Tensor, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Class indices, uint8 (H, W), and the 16-bit probability of the class chosen (binary: of the foreground)."""
    if probability.ndim == 2:
        levels = quantise(probability).cpu().numpy().astype(np.uint16)
        return (levels >= level(threshold)).astype(np.uint8), levels
    best, chosen = probability.cpu().max(0)
    return chosen.numpy().astype(np.uint8), quantise(best).numpy().astype(np.uint16)


def drop_specks(probability: Tensor, threshold: float | None, min_size: int) -> Tensor:
    """Probabilities without specks: connected regions of a class other than 0 of fewer than `min_size` pixels.

    Pixels that touch at a corner are connected. A speck's pixels certainly have the class of the nearest pixel outside
    specks: in a binary mask, background. Holes, which are regions of class 0, stay.
    """
    if min_size <= 1:
        return probability
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label  # half a second, which only this should cost

    classes = classify(probability, threshold)[0].astype(np.int64)
    regions = label(classes, background=0, connectivity=2)
    specks = (np.bincount(regions.ravel()) < min_size)[regions] & (regions > 0)
    classes[specks] = 0 if specks.all() else classes[specks]  # a picture of nothing but specks
    nearest = distance_transform_edt(specks, return_distances=False, return_indices=True)
    specks, classes = (torch.from_numpy(array).to(probability.device) for array in (specks, classes[tuple(nearest)]))
    certain = classes if probability.ndim == 2 else nn.functional.one_hot(classes, len(probability)).movedim(-1, 0)
    return torch.where(specks, certain.to(probability), probability)


def render(probability: Tensor, threshold: float | None = None, palette=None) -> tuple[np.ndarray, dict[str, bytes]]:
    """Class indices uint8 (H, W), and what shows them as files, by ending; a binary mask, but for a palette, as 255."""
    classes, levels = classify(probability, threshold)
    scale = 255 if probability.ndim == 2 and not palette else 1
    files = {"_mask.png": to_png(classes * scale, palette), "_probability.png": to_png(levels)}
    if probability.ndim == 3:
        files["_color.png"] = to_png(colour_classes(classes, len(probability)))
    return classes, files


def write_large(stem: Path, parts: Iterator[tuple[slice, Tensor]], size: tuple[int, int], run: Run) -> None:
    """Write mask and probability of a picture predicted in strips as tiled TIFFs; until then they lie on the disk."""
    mask, levels = (on_disk(size, dtype, stem.parent) for dtype in (np.uint8, np.uint16))
    palette = run.config.data.palette
    for rows, part in parts:
        mask[rows], levels[rows] = classify(part, run.threshold)
        mask[rows] *= 255 if run.config.model.num_classes == 1 and not palette else 1
        let_go(mask)
        let_go(levels)
    colours = bytes.fromhex("".join(palette or ()).replace("#", "")).ljust(3 * 256, b"\0")
    table = np.frombuffer(colours, np.uint8).reshape(256, 3).T * np.uint16(257)  # of 16 bits, as TIFF has it
    shown = {"photometric": "palette", "colormap": table} if palette else {}
    for name, array, how in (("mask", mask, shown), ("probability", levels, {})):
        with whole_file(stem.with_name(f"{stem.name}_{name}.tif")) as to:
            imwrite(to, array, tile=(256, 256), compression="zlib", metadata=None, bigtiff=array.nbytes > 2**31, **how)


def frames(image: np.ndarray, probability: Tensor, classes: np.ndarray) -> list[np.ndarray]:
    """Image, probability and mask as pictures uint8 (H, W, 3)."""
    photo = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
    mask = np.stack([classes * 255] * 3, -1)
    if probability.ndim == 3:
        mask, probability = colour_classes(classes, len(probability)), probability.amax(0)
    return [photo, np.stack([(probability.numpy() * 255).round().astype(np.uint8)] * 3, -1), mask]


def find_inputs(paths: list[Path | str]) -> list[Path]:
    """The image files among files and folders; two of one stem would overwrite each other's predictions."""
    files = [file for path in map(Path, paths) for file in (images.list_images(path) if path.is_dir() else [path])]
    stems = {}
    for path in files:
        if (other := stems.setdefault(path.stem.casefold(), path)) is not path:
            raise UserError(f"{path}: its predictions would overwrite those of {other}; predict them apart.")
    return files


def find_truths(inputs: list[Path], truth: Path | str, meaning="auto") -> dict[Path, np.ndarray]:
    """Masks (H, W) for the images, found by name as in a folder data set; `meaning` as in `decode_mask`, or `auto`."""
    truth = Path(truth)
    if not truth.is_dir() and len(inputs) > 1:
        raise UserError(f"{truth}: this is one mask for {len(inputs)} images; name a folder of masks.")
    masks = pair_by_name(inputs, images.list_images(truth)) if truth.is_dir() else {inputs[0]: truth}
    meaning = find_meaning(list(masks.values()), meaning)
    coloured = isinstance(meaning, images.Colours)
    return {path: images.decode_mask(images.read_mask_values(at, coloured), meaning, at) for path, at in masks.items()}
