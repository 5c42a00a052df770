import io

import numpy as np
from PIL import Image

from unet_helpers.plots import animate, colour_classes, error_map, plot_history, to_png


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


def test_classes_get_different_colours_and_ignored_pixels_grey():
    classes = np.arange(8, dtype=np.uint8)[None]
    assert len({tuple(colour) for colour in colour_classes(classes)[0].tolist()}) == 8
    assert colour_classes(np.array([[255]], np.uint8))[0, 0].tolist() == [128, 128, 128]


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
