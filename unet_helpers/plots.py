"""Pictures of training and of predictions. Colours stay apart for colour-blind readers."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageOps

from unet_helpers.config import IGNORE

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"  # two of Okabe and Ito's colour-blind safe palette, and a grey
FEW_COLOURS = ("#000000", ORANGE, BLUE, "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#E69F00")  # theirs, too
CELL = 240  # pixels for the longer side of a picture on a contact sheet
MANY_COLOURS = (  # Paul Tol's discrete rainbow, safe for colour-blind readers, in an order that keeps neighbours apart
    "#7BAFDE", "#882E72", "#F7F056", "#D1BBD7", "#DC050C", "#4EB265", "#E8601C",
    "#1965B0", "#F6C141", "#AE76A3", "#CAE0AB", "#5289C7", "#F1932D", "#90C987",
)  # fmt: skip


def plot_history(history: list[dict], title: str = "") -> Figure:
    """Loss and Dice by epoch from the rows of `history.csv`; a figure that pyplot does not know, for `display`."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 3.6))  # with fixed margins: a layout that is computed takes as long as the drawing
    losses, dice = figure.subplots(1, 2, gridspec_kw={"left": 0.06, "right": 0.99, "bottom": 0.14, "wspace": 0.15})
    losses.plot(epochs[1:], [row["train_loss"] for row in history[1:]], color=BLUE, label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], color=ORANGE, linestyle="--", label="validation")
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend()
    dice.plot(epochs, [row["val_dice"] for row in history], color=ORANGE, linestyle="--", label="validation")
    if drawn := [row for row in history if row["val_dice"] is not None]:
        best = max(drawn, key=lambda row: row["val_dice"])
        label = f"best: {best['val_dice']:.4f} (epoch {best['epoch']})"
        dice.plot(best["epoch"], best["val_dice"], "o", color=GREY, label=label)
    dice.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1))
    dice.legend(loc="lower right")
    for axes in (losses, dice):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, parse_math=False)  # a name with $ in it is no formula
    return figure


def to_png(picture: Figure | np.ndarray, palette: Sequence[str] | None = None) -> bytes:
    """A figure, or an array, uint8 or uint16 (H, W) or uint8 (H, W, 3), as a PNG; `#rrggbb` show numbers as colours."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=120)
    else:
        image = Image.fromarray(picture)
        if palette:
            image.putpalette(bytes.fromhex("".join(palette).replace("#", "")))
        image.save(buffer, "PNG")
    return buffer.getvalue()


def error_map(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """True positives white, false positives (also of a wrong class) red, false negatives blue: uint8 (H, W, 3).

    Both are class indices (H, W), of which all but 0 are foreground; 255 in the truth is not scored and stays black.
    """
    found, picture = prediction > 0, np.zeros((*truth.shape, 3), np.uint8)
    picture[found & (prediction == truth)] = (255, 255, 255)
    picture[found & (prediction != truth)] = (230, 50, 30)
    picture[~found & (truth > 0)] = (40, 110, 255)
    picture[truth == IGNORE] = 0
    return picture


def class_colours(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 (K, 3): of up to 8, class 0 black; beyond 14 they come again, darker."""
    colours = FEW_COLOURS if num_classes <= len(FEW_COLOURS) else MANY_COLOURS
    rounds, place = np.divmod(np.arange(num_classes), len(colours))
    return (255 * to_rgba_array(colours)[place, :3] * 0.65 ** rounds[:, None]).round().astype(np.uint8)


def colour_classes(classes: np.ndarray, num_classes: int = 8) -> np.ndarray:
    """Class indices (H, W) below `num_classes`, or 255, as an RGB picture uint8 (H, W, 3); 255 is grey."""
    colours = np.full((256, 3), 128, np.uint8)
    colours[:num_classes] = class_colours(num_classes)
    return colours[classes]


def overlay(image: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """A photograph, see `images.read_image`, tinted and outlined by class, but for class 0: uint8 (H, W, 3)."""
    from skimage.segmentation import find_boundaries  # slow to import, too

    photo = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
    share = np.where(classes == 0, 0, np.where(find_boundaries(classes, mode="inner"), 1, 0.35))[..., None]
    return (photo * (1 - share) + colour_classes(classes, num_classes) * share).round().astype(np.uint8)


def contact_sheet(pictures: Sequence[np.ndarray], titles: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Pictures, uint8 (H, W, 3) of any sizes, four in a row, and a legend of classes, all but the first."""
    legend = list(zip(names, class_colours(len(names)).tolist(), strict=True))[1:]
    side, line, rows, below = CELL + 8, 16, -(-len(pictures) // 4), -(-len(legend) // 6)
    sheet = Image.new("RGB", (4 * side + 8, rows * (side + line) + below * line + 8), "white")
    draw = ImageDraw.Draw(sheet)  # much faster than a figure of as many axes
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = 8 + number % 4 * side, 4 + number // 4 * (side + line)
        draw.text((x, y), title.encode("ascii", "replace")[-38:].decode(), "black")
        sheet.paste(ImageOps.contain(Image.fromarray(picture), (CELL, CELL), Image.Resampling.NEAREST), (x, y + line))
    for number, (name, colour) in enumerate(legend):
        x, y = 8 + number % 6 * 2 * side // 3, 4 + rows * (side + line) + number // 6 * line
        draw.rectangle((x, y, x + 12, y + 11), tuple(colour), GREY)
        draw.text((x + 18, y), name.encode("ascii", "replace")[:18].decode(), "black")
    return np.array(sheet)


def class_handles(names: Sequence[str]) -> list[Patch]:
    """What `legend(handles=...)` needs to explain the colours of a `colour_classes` picture."""
    colours = class_colours(len(names)) / 255
    return [Patch(facecolor=colour, edgecolor=GREY, label=name) for colour, name in zip(colours, names, strict=True)]


def plot_arms(table: list[dict], baseline: str) -> Figure:
    """The arms of a study, as `studies.summarise_study` lists them: each seed a dot, their mean with its interval."""
    figure = Figure(figsize=(8, 1 + 0.35 * len(table)), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(table):
        axes.plot([entry["low"], entry["high"]], [place] * 2, color=BLUE, linewidth=2)
        axes.plot(entry["mean"], place, "D", color=BLUE, markersize=6)
        axes.plot(entry["dices"], [place] * len(entry["dices"]), "o", color="black", mfc="white", markersize=4)
        if entry["arm"] == baseline:
            axes.axvline(entry["mean"], color=ORANGE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(table)), [entry["arm"] for entry in table], parse_math=False)
    axes.set(xlabel="validation Dice: seeds, mean and 95% interval", ylim=(len(table) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    return figure


def animate(frames: list[np.ndarray], seconds: float = 1.0) -> bytes:
    """Pictures uint8 (H, W, 3) one after the other as the bytes of an endless animated GIF."""
    (first, *others), buffer = map(Image.fromarray, frames), io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=int(seconds * 1000), loop=0)
    return buffer.getvalue()
