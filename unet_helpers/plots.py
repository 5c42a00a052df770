"""Pictures of training and of predictions. Colours stay apart for colour-blind readers."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from unet_helpers.config import IGNORE

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"  # Okabe and Ito's colour-blind safe palette
CLASS_COLOURS = np.array([
    (0, 0, 0), (213, 94, 0), (0, 114, 178), (0, 158, 115),
    (240, 228, 66), (204, 121, 167), (86, 180, 233), (230, 159, 0),
], dtype=np.uint8)  # fmt: skip


def plot_history(history: list[dict], title: str = "") -> Figure:
    """Loss and Dice by epoch from the rows of `history.csv`; a figure that pyplot does not know, for `display`."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, dice = figure.subplots(1, 2)
    losses.plot(epochs[1:], [row["train_loss"] for row in history[1:]], color=BLUE, label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], color=ORANGE, linestyle="--", label="validation")
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend()
    dice.plot(epochs, [row["val_dice"] for row in history], color=ORANGE, linestyle="--", label="validation")
    drawn = [row for row in history if row["val_dice"] is not None]
    if drawn:
        best = max(drawn, key=lambda row: row["val_dice"])
        label = f"best: {best['val_dice']:.4f} (epoch {best['epoch']})"
        dice.plot(best["epoch"], best["val_dice"], "o", color=GREY, label=label)
    dice.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1))
    dice.legend(loc="lower right")
    for axes in (losses, dice):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        figure.suptitle(title)
    return figure


def to_png(picture: Figure | np.ndarray) -> bytes:
    """A figure, or an array, uint8 or uint16 (H, W) or uint8 (H, W, 3), as the bytes of a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=120)
    else:
        Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def error_map(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where a prediction is right and wrong: true positives white, false positives red, false negatives blue.

    Both are class indices (H, W); 255 in the truth is not scored and stays black. With several classes anything but 0
    is foreground, and foreground of the wrong class is a false positive. Returns uint8 (H, W, 3).
    """
    scored = truth != IGNORE
    found, there, right = prediction > 0, (truth > 0) & scored, prediction == truth
    picture = np.zeros((*truth.shape, 3), np.uint8)
    picture[scored & found & right] = (255, 255, 255)
    picture[scored & found & ~right] = (230, 50, 30)
    picture[scored & there & ~found] = (40, 110, 255)
    return picture


def colour_classes(classes: np.ndarray) -> np.ndarray:
    """Class indices (H, W) as an RGB picture uint8 (H, W, 3); 255 is grey, colours repeat after eight classes."""
    picture = CLASS_COLOURS[classes % len(CLASS_COLOURS)]
    picture[classes == IGNORE] = 128
    return picture


def animate(frames: list[np.ndarray], seconds: float = 1.0) -> bytes:
    """Pictures uint8 (H, W, 3) one after the other as the bytes of an endless animated GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=int(seconds * 1000), loop=0)
    return buffer.getvalue()
