"""Picture files as arrays: what a file means as a photograph, what it means as a mask, and where its field of view is.

A photograph is made of colours (`read_image`); a mask is made of numbers, however a viewer colours them
(`read_mask_values`), and `mask_meaning` decides once for a whole data set what 1 and 255 stand for.
"""

import logging
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps

from unet_helpers.config import IGNORE, UserError, one_line
from unet_helpers.system import on_disk


class Colours(dict[int, int]):
    """Which class each colour, 0xRRGGBB, of a data set's masks is."""


class InColours(UserError):
    """A mask is a picture in true colours, and cannot be read as numbers."""


Meaning = Literal["binary", "classes"] | dict[int, int]  # a dictionary says which class each value is
Statistics = tuple[np.ndarray, np.ndarray]  # mean and standard deviation of each channel
# Mean and standard deviation of the channels, as parts of full scale, for `config.data.normalisation`.
CONSTANTS = {"none": ((0, 0, 0), (1, 1, 1)), "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
MAX_COLOURS = 254  # of the masks of a data set
Image.init()
FORMATS = sorted(Image.OPEN.keys() - {"EPS", "IPTC"})  # a program for Ghostscript, and what may hold one
# What Pillow's plug-ins, tifffile and NumPy raise for files that are damaged, or something else.
DAMAGE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError)
DAMAGE = (*DAMAGE, TypeError, ValueError, struct.error, zlib.error, tifffile.TiffFileError)
LARGE = 2**25  # pixels; larger pictures are predicted strip by strip
STRIP = 512  # rows that are worked on at a time
VIEW_SIDE = 2048  # pixels; in larger pictures only every second pixel, or third, is asked for the field of view
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes with more than 8 bits
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is said in one line


def list_images(folder: str | Path) -> list[Path]:
    """The pictures in a folder, not below it, sorted, without hidden ones; `UserError` if there are none."""
    folder, form_of, readable = Path(folder), Image.registered_extensions(), {*FORMATS, "MPO"}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [path for path in folder.iterdir() if form_of.get(path.suffix.lower()) in readable and path.name[0] != "."]
    if paths := sorted(path for path in files if path.is_file()):
        return paths
    raise UserError(f"{folder}: no pictures in this folder: put some there, or name another folder")


def _open(path: str | Path) -> tuple[Image.Image, str, bool]:
    """A picture, decoded and upright; its format; whether Pillow silently keeps 8 of its 16 bits a colour channel."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            pages = range(picture.n_frames)[::-1] if picture.format == "TIFF" else [0]  # back to the first
            if [picture.seek(page) or picture.size for page in pages].count(picture.size) > 1:  # smaller ones: previews
                raise UserError(f"{path}: a stack of {len(pages)} pictures: save each slice, or channels as one RGB")
            deep = picture.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in picture.tile)
            tags = getattr(picture, "tag_v2", {})
            if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and max(tags.get(ExifTags.Base.BitsPerSample)) > 8:
                raise UserError(f"{path}: more than 8 bits in separate planes of colour: save it as PNG")
            picture.load()
            return ImageOps.exif_transpose(picture), picture.format, deep
    except Image.DecompressionBombError as error:
        remedy = "cut it up, or save it as a tiled TIFF, grey or RGB, plain or by deflate, and set --max-pixels"
        raise UserError(f"{path}: too large to open safely ({error}): {remedy}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror}: name an image file") from error
    except DAMAGE as error:
        raise UserError(f"{path}: damaged, or no picture of a kind we read ({one_line(error)}): use PNG") from error


def orientation(path: str | Path) -> int:
    """How the EXIF data of a picture turn it: 1 not at all, 2 to 8 some way."""
    with Image.open(path) as picture:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)


def read_image(path: str | Path) -> np.ndarray:
    """Read a photograph: uint8 (H, W, 3) in 0..255, or float32 (H, W, 3) in 0..1 if the file has more than 8 bits.

    Deep pictures are stretched to 0..1 from their own darkest and brightest values, since a 16-bit file may come from a
    12-bit camera; beyond these lie at most a ten-thousandth of the pixels at each end, such as a sensor's hot ones.
    Grey becomes three equal channels, palettes become colours, alpha is dropped (the colour beneath stays), EXIF
    orientation is followed, the first frame counts. `UserError` names a file that cannot be read, or holds a stack.
    """
    picture, _, is_deep = _open(path)
    if picture.mode in DEEP_MODES:
        return _stretch(np.array(picture))
    with suppress(cv2.error):  # as for more than 2^20 pixels a side
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH  # follows the orientation, unlike IMREAD_UNCHANGED
        deep = cv2.imdecode(np.fromfile(path, np.uint8), flags) if is_deep else None
        if deep is not None and deep.dtype == np.uint16 and deep.ndim == 3 and deep.shape[1::-1] == picture.size:
            return _stretch(deep[..., ::-1])  # OpenCV's order is blue, green, red
    return np.array(picture.convert("RGB"))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Map the finite values of (H, W) or (H, W, 3), as `read_image` says, to float32 (H, W, 3); the others become 0."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], (0.01, 99.99), method="nearest") if finite.any() else (0.0, 0.0)
    scaled = np.where(finite, (values - low) / ((high - low) or 1.0), 0.0).clip(0, 1).astype(np.float32)
    return np.stack([scaled] * 3, axis=-1) if scaled.ndim == 2 else np.ascontiguousarray(scaled)


def open_image(path: str | Path, max_pixels: int | None = None) -> np.ndarray:
    """What `read_image` gives; a `LARGE` tiled TIFF in 8-bit grey or RGB is decoded to the disk and memory-mapped.

    `UserError` as there, and for more than `max_pixels`, by default those that Pillow opens (179 million).
    """
    try:
        with tifffile.TiffFile(path) as file:
            page, most = file.pages.first, max_pixels or 2 * Image.MAX_IMAGE_PIXELS
            simple = page.dtype == np.uint8 and page.photometric in (1, 2) and page.planarconfig == 1
            simple &= page.samplesperpixel != 2 and page.tags.valueof("Orientation", 1) == 1
            if not (simple and page.is_tiled and (pixels := page.imagewidth * page.imagelength) > LARGE):
                return read_image(path)
            if pixels > most:
                raise UserError(f"{path}: has {pixels} pixels; so many must be asked for: set --max-pixels {pixels}")
            values = np.atleast_3d(page.asarray(out=on_disk(page.shape, np.uint8)))
        return np.broadcast_to(values[..., :3], (*values.shape[:2], 3))
    except DAMAGE:  # no TIFF, or a damaged one, or one that needs a decoder which tifffile has not
        return read_image(path)


def strips(shape: tuple[int, ...], height: int = STRIP) -> list[slice]:
    """The rows of a picture of this shape, some at a time."""
    return [slice(top, min(top + height, shape[0])) for top in range(0, shape[0], height)]


def read_mask_values(path: str | Path, colours: bool = False) -> np.ndarray:
    """Read the numbers in a mask file: uint8 or uint16 (H, W), as stored; with `colours`, uint32 0xRRGGBB.

    Palette pictures give their indices, never their colours (`convert("L") > 0` reads DRIVE's second observer wrongly:
    Dice .226 instead of .789), but those in pure black and white give 0 and 255, as programs number these as they
    please. 1-bit pictures give 0 and 1; grey stored as RGB(A) gives one channel. `UserError` for a GIF whose greys
    were numbered anew (Pillow saves 0, 1, 255 as 0, 1, 2), a JPEG, and `InColours` for true colours without `colours`.
    """
    picture, form, is_deep = _open(path)
    form = "JPEG" if picture.info.get("compression") == "jpeg" else form  # inside a TIFF
    if form in ("JPEG", "MPO", "JPEG2000"):
        raise UserError(f"{path}: a mask saved as {form} is inexact: save the original, or what exceeds 127, as PNG")
    if is_deep or (colours and picture.mode in DEEP_MODES):
        raise UserError(f"{path}: a mask in colours must have 8 bits a channel, not 16: save it again, as PNG")
    if colours:
        return np.array(picture.convert("RGB"), np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    values = np.array(picture, np.uint8 if picture.mode == "1" else None)
    if picture.mode == "P" and (form == "GIF" or picture.palette.colors.keys() <= {(0, 0, 0), (255, 255, 255)}):
        rgb, grey = np.array(picture.convert("RGB")), np.array(picture.convert("L"))
        if (rgb == grey[..., None]).all():
            if np.isin(grey, (0, 255)).all():
                return grey
            if (grey != values).any() and (values.max() > 1 or np.ptp(grey) < 128):
                raise UserError(f"{path}: indices or greys of this GIF may be the classes: save the mask as PNG")
    if values.ndim == 3:
        channels = values[..., :1] if picture.mode == "LA" else values[..., :3]
        if picture.mode not in ("LA", "RGB", "RGBA") or (channels != channels[..., :1]).any():
            raise InColours(f"{path}: a mask in colours ({picture.mode}): save class indices, or set data.mask_values")
        values = np.ascontiguousarray(channels[..., 0])
    if values.dtype != np.uint8:
        if not ((values >= 0) & (values < 2**16) & (values == np.round(values))).all():
            raise UserError(f"{path}: mask values must be whole numbers from 0 to 65535: save class indices, as PNG")
        values = values.astype(np.uint16)
    return values


def survey_mask(path: str | Path) -> tuple[set[int], dict[int, tuple]]:
    """The numbers in a mask file and, of a palette picture that is not all grey, the colour of each."""
    numbers, used = set(np.flatnonzero(np.bincount(read_mask_values(path).ravel())).tolist()), {}
    with Image.open(path) as picture:
        if picture.mode == "P":
            palette = picture.getpalette("RGB")
            used = {index: tuple(palette[3 * index : 3 * index + 3]) for _, index in picture.getcolors(256)}
    return numbers, {} if all(len(set(colour)) == 1 for colour in used.values()) else used


def mask_meaning(values: Iterable[int]) -> Meaning:
    """Decide what the numbers in the masks of one data set mean, from all the values found in all its masks.

    {0, 1} (or fewer), {0, 255} and {0, 65535} are `binary`; {0..k} and {0..k, 255}, with a few k missing, are
    `classes`, where 255 means "ignore", also in {0, 1, 255}. Anything else, such as {3, 17, 250}, raises `UserError`.
    """
    found = sorted(map(int, set(values)))
    if not found:
        raise UserError("no mask values found: there are no masks")
    if found == [IGNORE]:
        raise UserError("all masks hold nothing but 255: set data.mask_values to `binary` or `classes`, or mend them")
    if set(found) <= {0, 1} or found in ([0, IGNORE], [0, 2**16 - 1]):
        return "binary"
    classes = [value for value in found if value != IGNORE]
    missing = classes[-1] + 1 - len(classes)
    if classes[-1] > IGNORE or missing > max(1, (classes[-1] + 1) // 4):
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        reason = "masks resized with interpolation or once saved as JPEG look like this"
        problem = f"unexpected mask values {shown}: neither 0/1, 0/255 nor class indices 0..k; {reason}"
        raise UserError(f"{problem}: export again, or set data.mask_values (to what, says data/README.md)")
    return "classes"


def find_palette(masks: Iterable[Path]) -> Colours:
    """The class of each colour in the masks of a data set: black comes first, or else the most frequent; then by value.

    `UserError` names the mask with the most colours where they cannot all be classes: more than 254 in all masks, or
    over 16 of which most cover less than a thousandth of their mask, as the shades along smoothed edges do.
    """
    pixels, held, rare = Counter(), Counter(), 0
    for path in masks:
        colours, counts = np.unique(read_mask_values(path, colours=True), return_counts=True)
        pixels.update(dict(zip(colours.tolist(), counts.tolist(), strict=True)))
        held[path], rare = len(colours), rare + int((1000 * counts < counts.sum()).sum())
        if len(pixels) > MAX_COLOURS:
            break
    if len(pixels) > MAX_COLOURS or (len(pixels) > 16 and 2 * rare > held.total()):
        (path, count), *_ = held.most_common()
        problem = f"holds {count} colours, and all masks {len(pixels)} or more: smoothed edges or JPEG make so many"
        remedy = "export the masks again without them, as PNG, or list the colours that are classes in data.palette"
        raise UserError(f"{path}: {problem}: {remedy}")
    first = 0 if 0 in pixels else min(pixels, key=lambda colour: (-pixels[colour], colour))
    return Colours({colour: n for n, colour in enumerate(sorted(pixels, key=lambda one: (one != first, one)))})


def decode_mask(values: np.ndarray, meaning: Meaning, path: str | Path = "mask") -> np.ndarray:
    """Turn numbers (H, W) from a file into a mask, uint8 (H, W) of class indices with 255 for "ignore".

    With `binary` all but 0 becomes 1; a dictionary gives each class. `UserError`, by `path`, if not, or above 255.
    """
    if isinstance(meaning, dict):
        known, classes = np.array(sorted(meaning.items())).T
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        if (wrong := values[known[place] != values]).size:
            value = f"the colour #{wrong[0]:06x}" if isinstance(meaning, Colours) else f"the label {wrong[0]}"
            raise UserError(f"{path}: holds {value}, which is no class of this data set: mend it, or get it again")
        return classes[place].astype(np.uint8)
    if meaning == "binary":
        return (values != 0).astype(np.uint8)
    if values.max(initial=0) > IGNORE:
        raise UserError(f"{path}: holds {values.max()}: class indices go from 0 to 254, and 255 means ignore")
    return values.astype(np.uint8)


def shrink(array: np.ndarray, longest_side: int | None, is_mask: bool = False) -> np.ndarray:
    """Reduce an image (H, W, 3), by means over areas, or a mask (H, W), by nearest pixels, to sides of at most that."""
    factor = (longest_side or math.inf) / max(array.shape[:2])
    if factor >= 1:
        return array
    size = [max(1, round(side * factor)) for side in array.shape[1::-1]]
    if array.ndim == 3 and array.strides[2] == 0:  # grey as three channels, of which OpenCV would make three
        return np.stack([shrink(array[..., 0], longest_side)] * 3, axis=-1)
    return cv2.resize(array, size, interpolation=cv2.INTER_NEAREST_EXACT if is_mask else cv2.INTER_AREA)


def field_of_view(image: np.ndarray) -> np.ndarray:
    """Find the part of a photograph that the camera saw: bool (H, W), estimated from the image (H, W, 3) alone.

    Only where a round aperture leaves four black corners something is cut off: the largest region brighter than they is
    kept, holes filled and outline smoothed, if it is round and covers a quarter. Other pictures are all field of view.
    """
    step = -(-max(image.shape[:2]) // VIEW_SIDE)
    if step > 1:
        thin, (height, width) = field_of_view(image[::step, ::step]), image.shape[:2]
        wide = thin.repeat(step, axis=1)[:, :width]
        return np.broadcast_to(True, (height, width)) if thin.all() else wide.repeat(step, axis=0)[:height]
    full_scale = 255.0 if image.dtype == np.uint8 else 1.0
    brightness = cv2.GaussianBlur(image.max(axis=2).astype(np.float32) / full_scale, (5, 5), 0)
    side = max(1, min(brightness.shape) // 40)
    ends = slice(side), slice(-side, None)
    everything = np.ones(brightness.shape, dtype=bool)
    black = max(float(np.median(brightness[y, x])) for y in ends for x in ends)
    bright = float(np.percentile(brightness, 75))
    if black > 0.15 or black > 0.3 * bright or bright == 0:
        return everything
    region = (brightness > black + 0.15 * (bright - black)).astype(np.uint8)
    outlines, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = sorted(outlines, key=cv2.contourArea)[-1:]
    filled = cv2.drawContours(np.zeros_like(region), largest, -1, 1, thickness=cv2.FILLED)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * side + 1, 2 * side + 1))
    # The margin lets the outline touch the picture's edge, where a camera cuts the circle off.
    padded = cv2.copyMakeBorder(filled, *[2 * side] * 4, cv2.BORDER_REPLICATE)
    smooth = cv2.morphologyEx(cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel), cv2.MORPH_OPEN, kernel)
    view = smooth[2 * side : -2 * side, 2 * side : -2 * side]
    # An aperture fills the frame and is round, but for what the frame cuts off; an object on a dark ground rarely is.
    (x, y), radius = cv2.minEnclosingCircle(cv2.convexHull(cv2.findNonZero(view))) if view.any() else ((0, 0), 0)
    disc = cv2.circle(np.zeros_like(view), (round(x), round(y)), round(radius), 1, cv2.FILLED)
    return view.astype(bool) if view.mean() > 0.25 and view.sum() > 0.9 * disc.sum() else everything


def view_diameter(view: np.ndarray) -> int | None:
    """Diameter in pixels of a field of view, bool (H, W), where it is widest or highest; None if it is everything."""
    return None if view.all() else max(cv2.boundingRect(view.astype(np.uint8))[2:]) or None


def statistics_inside(image: np.ndarray, view: np.ndarray) -> Statistics:
    """Mean and standard deviation of each channel inside the view, float32 (3,); constant: 1, empty view: 0 and 1."""
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for rows in strips(image.shape):
        pixels = image[rows][view[rows]].astype(np.float64)
        count, total, squares = count + len(pixels), total + pixels.sum(axis=0), squares + (pixels**2).sum(axis=0)
    mean = total / max(count, 1)
    deviation = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    deviation[deviation < (0.255 if image.dtype == np.uint8 else 1e-6)] = 1.0  # what rounding may leave
    return mean.astype(np.float32), deviation.astype(np.float32)


def normalise(image: np.ndarray, view=None, statistics: Statistics | None = None, kind: str = "image") -> np.ndarray:
    """Scale an image, uint8 or float32 (H, W, 3), to mean 0 and standard deviation 1 in each channel: finite float32.

    Outside `view`, bool (H, W), by default its `field_of_view`, it is 0; a patch takes the whole image's `statistics`.
    Another `kind`, see `config.data.normalisation`, takes constants instead of statistics.
    """
    view = field_of_view(image) if view is None else view
    if kind != "image":
        full_scale = np.float32(255 if image.dtype == np.uint8 else 1)
        statistics = [full_scale * np.float32(values) for values in CONSTANTS[kind]]
    mean, deviation = statistics_inside(image, view) if statistics is None else statistics
    scaled = image.astype(np.float32)
    scaled -= mean
    scaled /= deviation
    scaled[view & (scaled == 0).all(2)] = 1e-6  # exactly 0 in all channels is what `predict_probabilities` leaves out
    scaled[~view] = 0.0
    return scaled
