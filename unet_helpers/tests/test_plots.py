import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageSequence
from skimage.color import rgb2lab

from unet_helpers.plots import (
    animate,
    class_colours,
    class_handles,
    colour_classes,
    error_map,
    plot_arms,
    plot_history,
    to_png,
)

ROOT = Path(__file__).parents[2]


def test_error_map_of_a_hand_made_case():
    truth = np.array([[1, 1, 0, 0, 255, 255]], np.uint8)
    prediction = np.array([[1, 0, 1, 0, 1, 0]], np.uint8)
    picture = error_map(prediction, truth)[0]
    assert picture.shape == (6, 3)
    hit, missed, invented, nothing, *ignored = picture.tolist()
    assert hit == [255, 255, 255]
    assert missed[2] > 200 > missed[0]  # blue
    assert invented[0] > 200 > invented[2]  # red
    assert nothing == ignored[0] == ignored[1] == [0, 0, 0]


def test_error_map_counts_a_wrong_class_as_invented():
    picture = error_map(np.array([[2]]), np.array([[1]]))
    assert picture[0, 0, 0] > 200


@pytest.mark.parametrize("count", [2, 3, 8, 11, 13, 40])
def test_classes_get_different_colours_and_ignored_pixels_grey(count):
    picture = colour_classes(np.array([[*range(count), 255]], np.uint8), count)
    assert len({tuple(colour) for colour in picture[0].tolist()}) == count + 1
    assert picture[0, -1].tolist() == [128, 128, 128]
    handles = class_handles([f"class {index}" for index in range(count)])
    assert [handle.get_label() for handle in handles][1] == "class 1"
    np.testing.assert_allclose([handle.get_facecolor()[:3] for handle in handles], picture[0, :-1] / 255)


@pytest.mark.parametrize("count", [3, 11])
def test_colours_stay_apart_for_colour_blind_readers(count):
    """Distances in CIELAB as a deuteranope and a protanope see them (Machado et al. 2009); 2.3 is just noticeable."""
    machado = {
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    }
    linear = ((class_colours(count) / 255 + 0.055) / 1.055) ** 2.4
    for matrix in machado.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        lab = rgb2lab((1.055 * seen ** (1 / 2.4) - 0.055).clip(0, 1)[None])[0]
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(count, 1)]
        assert distances.min() > 6


def test_a_confusion_matrix_shows_shares_of_each_true_class():
    """Drawn by a cell of notebook 06, which is run here without the networks before it."""
    notebook = json.loads((ROOT / "notebooks" / "06_multiclass.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"np": np, "plt": plt, "tests": {}}
    exec(next(source for source in sources if "def show_confusion" in source), names)
    names["show_confusion"]([[3, 1, 0], [0, 0, 0], [1, 1, 2]], ["a", "b", "c"], "made up")
    figure = plt.gcf()
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "truth")
    assert to_png(figure).startswith(b"\x89PNG")
    plt.close(figure)


def test_history_is_drawn_even_where_dice_is_undefined():
    rows = [
        {"epoch": 0, "train_loss": None, "val_loss": 1.0, "val_dice": None},
        {"epoch": 1, "train_loss": 0.5, "val_loss": 0.7, "val_dice": None},
    ]
    assert to_png(plot_history(rows)).startswith(b"\x89PNG")
    rows[1]["val_dice"] = 0.5
    figure = plot_history(rows, "a run")
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert any("0.5000 (epoch 1)" in text for text in legend)


def test_an_animation_holds_its_frames():
    frames = [np.full((4, 5, 3), value, np.uint8) for value in (0, 100, 255)]
    with Image.open(io.BytesIO(animate(frames, 0.5))) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (5, 4), 500)
        assert gif.info["loop"] == 0  # endlessly
        shown = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    np.testing.assert_array_equal(shown, frames)


def test_names_with_dollars_are_no_formulas():
    assert to_png(plot_history([], "lr$_$ $\\frac{$")).startswith(b"\x89PNG")
    row = {"arm": "a$_$", "dices": [0.5], "low": 0.4, "high": 0.6, "mean": 0.5}
    assert to_png(plot_arms([row], "a$_$")).startswith(b"\x89PNG")
