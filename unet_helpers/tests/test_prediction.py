import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unet_helpers import images, prediction
from unet_helpers.catalogue import MEANINGS
from unet_helpers.config import AugmentationConfig, Config, DataConfig, UserError, dump_config, load_config
from unet_helpers.metrics import level
from unet_helpers.model import UNet, mirror_border
from unet_helpers.prediction import (
    drop_specks,
    find_truths,
    find_views,
    predict,
    predict_image,
    predict_logits,
    predict_probabilities,
    predict_strips,
    scale_of,
)  # fmt: skip
from unet_helpers.runs import Run, load_run
from unet_helpers.sample_data import make_retina


def network(**settings):
    torch.manual_seed(0)
    return UNet(3, widths=(4, 8), **settings).eval()


@pytest.mark.parametrize("settings", [{"norm": "batch"}, {"padding": "valid", "norm": "none"}])
def test_tiles_give_what_the_whole_image_gives(settings):
    model = network(**settings)
    image = torch.randn(1, 3, 150, 203)
    with torch.no_grad():
        whole, tiled = predict_logits(model, image), predict_logits(model, image, tile=64)
    assert whole.shape == (1, 1, 150, 203)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled.sigmoid(), whole.sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (37, 41)])
@pytest.mark.parametrize("settings", [{"norm": "batch"}, {"padding": "valid", "norm": "none"}])
def test_any_size_is_predicted_at_that_size(settings, size):
    probability = predict_probabilities(network(**settings), torch.randn(3, *size))
    assert probability.shape == size
    assert ((probability >= 0) & (probability <= 1)).all()


def test_valid_convolutions_see_a_mirrored_border():
    """In the middle, where no border reaches, both paddings agree; NumPy's reflection gives what the network saw."""
    model = network(padding="valid", norm="none")
    image = torch.randn(1, 3, 40, 40)
    needed = model.valid_input_size(40)
    by_numpy = np.pad(
        image.numpy(), [(0, 0), (0, 0)] + [(model.border, needed - 40 - model.border)] * 2, mode="reflect"
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(by_numpy))[..., :40, :40]
        torch.testing.assert_close(predict_logits(model, image), expected)


def test_borders_wider_than_the_image_are_mirrored_again_and_again():
    row = torch.arange(4.0).view(1, 1, 1, 4)
    expected = np.pad(row.numpy(), [(0, 0), (0, 0), (2, 3), (7, 9)], mode="reflect")
    np.testing.assert_array_equal(mirror_border(row, 7, 9, 2, 3).numpy(), expected)


def test_flip_averaging_makes_the_prediction_commute_with_flips():
    model = network(norm="none")
    image = torch.randn(3, 32, 48)
    with torch.no_grad():
        plain = predict_probabilities(model, image, flips=False)
        mirrored = predict_probabilities(model, image.flip(-1), flips=False).flip(-1)
    assert not torch.allclose(plain, mirrored)
    averaged = predict_probabilities(model, image)
    torch.testing.assert_close(predict_probabilities(model, image.flip(-2)).flip(-2), averaged)
    four = [predict_probabilities(model, image.flip(d), flips=False).flip(d) for d in ([], [-1], [-2], [-2, -1])]
    torch.testing.assert_close(averaged, torch.stack(four).mean(0))


def test_probabilities_of_several_classes_add_up_to_one():
    torch.manual_seed(0)
    model = UNet(3, 4, widths=(4, 8)).eval()
    probability = predict_probabilities(model, torch.randn(3, 17, 23))
    assert probability.shape == (4, 17, 23)
    torch.testing.assert_close(probability.sum(0), torch.ones(17, 23))


def test_outside_the_field_of_view_everything_is_background():
    image = torch.randn(3, 20, 30)
    image[:, :5] = 0
    probability = predict_probabilities(network(norm="none"), image)
    assert (probability[:5] == 0).all()
    assert (probability[5:] > 0).all()
    torch.manual_seed(0)
    several = predict_probabilities(UNet(3, 4, widths=(4, 8)).eval(), image)
    assert (several[0, :5] == 1).all()
    torch.testing.assert_close(several.sum(0), torch.ones(20, 30))


def test_a_mask_written_is_black_in_the_corners(trained_run, photographs, tmp_path):
    predict(trained_run, [photographs], tmp_path / "out", quiet=True)
    for name in ("eye1_mask.png", "eye1_probability.png"):
        picture = np.array(Image.open(tmp_path / "out" / name))
        assert picture[0, 0] == picture[0, -1] == picture[-1, 0] == picture[-1, -1] == 0


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed, size in ((1, (64, 64)), (2, (50, 71))):
        retina = make_retina(seed, size)
        Image.fromarray(retina.image).save(folder / f"eye{seed}.png")
    return folder


def test_a_folder_of_images_gives_masks_and_probabilities_at_their_own_sizes(trained_run, photographs, tmp_path):
    masks = predict(trained_run, [photographs], tmp_path / "out", gif=True, quiet=True)
    assert [path.name for path in masks] == ["eye1_mask.png", "eye2_mask.png"]
    names = {f"eye{n}{end}" for n in (1, 2) for end in ("_mask.png", "_probability.png", ".gif")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    probability = np.array(Image.open(tmp_path / "out" / "eye2_probability.png"))
    mask = np.array(Image.open(tmp_path / "out" / "eye2_mask.png"))
    assert probability.shape == mask.shape == (50, 71)
    assert probability.max() > 255  # 16 bit
    assert set(np.unique(mask)) <= {0, 255}
    np.testing.assert_array_equal(mask == 255, probability >= level(load_run(trained_run).threshold))
    with Image.open(tmp_path / "out" / "eye1.gif") as gif:
        assert gif.n_frames == 3


def test_given_the_truth_error_maps_are_written(trained_run, photographs, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for seed, size in ((1, (64, 64)), (2, (50, 71))):
        Image.fromarray(make_retina(seed, size).vessels).save(masks / f"eye{seed}_manual1.png")
    predict(trained_run, [photographs], tmp_path / "out", truth=masks, quiet=True)
    found, truth = np.array(Image.open(tmp_path / "out" / "eye2_mask.png")) == 255, make_retina(2, (50, 71)).vessels
    expected = np.zeros((50, 71, 3), np.uint8)  # black where both are background, and where the truth is not known
    parts = (found & (truth == 1), found & (truth == 0), ~found & (truth == 1))
    for part, colour in zip(parts, ((255, 255, 255), (230, 50, 30), (40, 110, 255)), strict=True):
        assert part.any()
        expected[part] = colour
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "eye2_errors.png")), expected)


def test_wrong_inputs_end_before_anything_is_written(trained_run, photographs, tmp_path):
    output = tmp_path / "out"
    (photographs / "zz.png").write_text("no picture")
    with pytest.raises(UserError, match=r"zz\.png"):
        predict(trained_run, [photographs], output, quiet=True)
    (photographs / "zz.png").unlink()
    Image.new("L", (9, 9)).save(tmp_path / "eye1.png")
    with pytest.raises(UserError, match="overwrite"):
        predict(trained_run, [photographs, tmp_path / "eye1.png"], output, quiet=True)
    Image.new("L", (9, 9)).save(tmp_path / "EYE1.gif")  # the same place on Windows and on Macs
    with pytest.raises(UserError, match="overwrite"):
        predict(trained_run, [photographs, tmp_path / "EYE1.gif"], output, quiet=True)
    with pytest.raises(UserError, match="size"):
        predict(trained_run, [photographs / "eye1.png"], output, truth=tmp_path / "eye1.png", quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        predict(trained_run, [tmp_path / "empty"], output, quiet=True)
    with pytest.raises(UserError, match="nowhere"):
        predict(trained_run, [tmp_path / "nowhere.png"], output, quiet=True)
    assert not output.exists()
    output.write_text("a file")
    with pytest.raises(UserError, match="out"):
        predict(trained_run, [photographs], output, quiet=True)


def test_predictions_do_not_go_among_the_images(trained_run, tmp_path):
    for name, picture in (("a", make_retina(0, 48).image), ("a_mask", make_retina(0, 48).vessels)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    before = (tmp_path / "a_mask.png").read_bytes()
    with pytest.raises(UserError, match="another output"):
        predict(trained_run, [tmp_path / "a.png"], tmp_path, quiet=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "photos" / "a.png")
    for truth in (tmp_path, tmp_path / "a_mask.png"):  # nor among the masks they are compared with
        with pytest.raises(UserError, match="another output"):
            predict(trained_run, [tmp_path / "photos"], tmp_path, truth=truth, quiet=True)
    assert (tmp_path / "a_mask.png").read_bytes() == before


def test_ground_truth_is_read_as_the_data_the_run_was_trained_on(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    images = [Path("a.png")]
    assert find_truths(images, tmp_path / "a.png")[images[0]].tolist() == [[0, 1]]
    assert find_truths(images, tmp_path / "a.png", "classes")[images[0]].tolist() == [[0, 255]]


def test_ground_truth_of_no_class_is_named(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 700]], np.uint16)).save(path)
    for meaning in ({0: 0, 1: 1}, "classes"):
        with pytest.raises(UserError, match=r"a\.png: holds .*700"):
            find_truths([path], path, meaning)


def test_one_mask_is_no_ground_truth_of_several_images(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: this is one mask for 2 images"):
        find_truths([tmp_path / "b.png", tmp_path / "c.png"], tmp_path / "a.png")


def test_ground_truth_in_the_form_of_a_public_set(tmp_path):
    """RITE's colours, and CamVid's labels of which 11 is void: as the data set itself reads them."""
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)).save(tmp_path / "a.png")
    assert find_truths([tmp_path / "a.png"], tmp_path / "a.png", MEANINGS["rite"])[tmp_path / "a.png"].tolist() == [
        [1, 2, 255]
    ]
    Image.fromarray(np.array([[0, 10, 11]], np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.array([[0, 1, 13]], np.uint8)).save(tmp_path / "c_13.png")
    assert find_truths([tmp_path / "c_13.png"], tmp_path / "c_13.png", MEANINGS["nyuv2-13"])[
        tmp_path / "c_13.png"
    ].tolist() == [[255, 0, 12]]
    assert find_truths([tmp_path / "b.png"], tmp_path / "b.png", MEANINGS["camvid"])[tmp_path / "b.png"].tolist() == [
        [0, 10, 255]
    ]


@pytest.mark.parametrize("flips", [False, True, "all", "turns"])
@pytest.mark.parametrize("settings", [{"norm": "batch"}, {"padding": "valid", "norm": "none"}])
def test_strips_give_what_the_whole_picture_gives(settings, flips, monkeypatch):
    monkeypatch.setattr(prediction, "STRIP", 56)
    opened = Run(Path("run"), Config(), network(**settings), {"threshold": 0.5})
    picture = np.random.default_rng(0).integers(0, 255, (131, 97, 3), dtype=np.uint8)
    whole = predict_image(opened.model, picture, torch.device("cpu"), flips)
    parts = list(predict_strips(opened, picture, torch.device("cpu"), flips, 0))
    assert len(parts) > 2
    torch.testing.assert_close(torch.cat([part for _, part in parts]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["image", "imagenet", "none"])
def test_a_picture_is_normalised_as_in_training_whole_or_in_strips(kind, monkeypatch):
    config, model = Config(), network(norm="none")
    config.data.normalisation = kind
    picture = np.random.default_rng(0).integers(0, 255, (131, 97, 3), dtype=np.uint8)
    tensor = torch.from_numpy(images.normalise(picture, kind=kind).transpose(2, 0, 1).copy())
    expected = predict_probabilities(model, tensor, False)
    whole = predict_image(model, picture, torch.device("cpu"), False, config.data)
    torch.testing.assert_close(whole, expected)
    monkeypatch.setattr(prediction, "STRIP", 56)
    parts = predict_strips(Run(Path("run"), config, model, {"threshold": 0.5}), picture, torch.device("cpu"), False, 0)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["view", "longest side"])
def test_strips_of_a_picture_that_is_reduced_are_those_of_the_whole(kind, monkeypatch):
    config, model = Config(), network(norm="none")
    picture = make_retina(1, (150, 163)).image
    if kind == "view":
        model.view_diameter = 70.0
    else:
        config.data.longest_side = 64
    monkeypatch.setattr(prediction, "STRIP", 56)
    parts = predict_strips(Run(Path("run"), config, model, {"threshold": 0.5}), picture, torch.device("cpu"), False, 0)
    whole = predict_image(model, picture, torch.device("cpu"), False, config.data)
    difference = (torch.cat([part for _, part in parts]) - whole).abs()
    assert difference.max() < 1e-5 if kind == "longest side" else difference.mean() < 0.03  # not reduced alike


def test_quarter_turns_make_the_prediction_commute_with_them():
    model, image = network(norm="none"), torch.randn(3, 32, 48)
    turned = image.rot90(1, (1, 2))
    for flips in ("turns", "all"):
        averaged = predict_probabilities(model, image, flips)
        torch.testing.assert_close(predict_probabilities(model, turned, flips), averaged.rot90(1))
    plain = predict_probabilities(model, image, True)
    assert not torch.allclose(predict_probabilities(model, turned, True), plain.rot90(1))


def test_views_are_those_that_training_has_shown():
    def config(flips, rotation):
        return Config(augmentation=AugmentationConfig(flips=flips, rotation=rotation))

    assert [find_views(config(True, 180), flips) for flips in (False, True, "rotations")] == [False, True, "all"]
    assert find_views(config(False, 180), "rotations") == "turns"
    assert find_views(config(True, 90), "rotations") == "all"  # both mirror images make the half turn
    for flips, rotation in ((True, 10), (False, 90), ("horizontal", 90)):
        with pytest.raises(UserError, match="rotations"):
            find_views(config(flips, rotation), "rotations")


def test_specks_are_removed_by_size():
    """By hand: 3 pixels that touch at corners, 2 beside each other, a ring whose hole stays."""
    said = np.zeros((9, 12), np.float32)
    said[[0, 1, 2], [0, 1, 2]] = said[6, 1:3] = 0.9
    said[4:8, 6:10] = 0.8
    said[5, 7] = 0.1
    cleaned = drop_specks(torch.from_numpy(said), 0.5, 3).numpy()
    expected = said.copy()
    expected[6, 1:3] = 0
    np.testing.assert_array_equal(cleaned, expected)
    assert (drop_specks(torch.from_numpy(said), 0.5, 16).numpy() < 0.5).all()
    assert (drop_specks(torch.full((3, 4), 0.9), 0.5, 13) == 0).all()  # nothing but a speck
    np.testing.assert_array_equal(drop_specks(torch.from_numpy(said), 0.5, 0), said)


def test_a_speck_of_several_classes_takes_the_class_around_it():
    classes = np.ones((7, 9), int)
    classes[:, 6:] = 2
    classes[3, 2:4] = 2
    classes[0, 0] = 0
    probability = torch.nn.functional.one_hot(torch.from_numpy(classes), 3).permute(2, 0, 1) * 0.4 + 0.2
    cleaned = drop_specks(probability, None, 3)
    expected = classes.copy()
    expected[3, 2:4] = 1
    np.testing.assert_array_equal(cleaned.argmax(0), expected)
    torch.testing.assert_close(cleaned.sum(0), torch.ones(7, 9))


def test_specks_are_the_same_in_strips(monkeypatch):
    monkeypatch.setattr(prediction, "STRIP", 40)
    picture = np.random.default_rng(1).integers(0, 255, (120, 70, 3), dtype=np.uint8)
    model = network(norm="none")
    whole = predict_image(model, picture, torch.device("cpu"), False)
    threshold = float(whole.quantile(0.7))
    opened = Run(Path("run"), Config(), model, {"threshold": threshold})
    parts = torch.cat([part for _, part in predict_strips(opened, picture, torch.device("cpu"), False, 9)])
    expected = drop_specks(whole, threshold, 9)
    assert (expected != whole).sum() > 50
    assert ((parts >= threshold) == (expected >= threshold)).float().mean() > 0.999  # but for rounding at the threshold


@pytest.mark.parametrize("longest_side", [None, 90, 500])
def test_strips_are_scaled_as_whole_pictures_are(longest_side):
    """The field of view, found as 118 pixels wide, is reduced to the 60 of training, whatever `longest_side` allows."""
    picture, config = make_retina(2, 128).image, Config(data=DataConfig(longest_side=longest_side))
    model = network()
    model.view_diameter = 60.0
    opened = Run(Path("run"), config, model, {"threshold": 0.5})
    parts = torch.cat([part for _, part in predict_strips(opened, picture, torch.device("cpu"), False, 0)])
    whole = predict_image(model, picture, torch.device("cpu"), False, config.data)
    model.view_diameter = None
    unscaled = predict_image(model, picture, torch.device("cpu"), False)
    assert (parts - whole).abs().mean() < (unscaled - whole).abs().mean() / 2  # it is reduced in another way


@pytest.fixture
def tiny_limit(monkeypatch):
    for module in (images, prediction):
        monkeypatch.setattr(module, "LARGE", 2000)


def without_view_diameter(run: Path, copy: Path) -> Path:
    """A copy of a run that takes pictures as large as they are."""
    shutil.copytree(run, copy)
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"view_diameter": None}))
    return copy


def test_a_large_tiff_gives_tiffs_with_what_a_small_picture_gives(trained_run, tmp_path, tiny_limit, monkeypatch):
    picture, run = make_retina(3, (150, 133)).image, without_view_diameter(trained_run, tmp_path / "run")
    monkeypatch.setattr(prediction, "STRIP", 56)  # of 150 rows
    tifffile.imwrite(tmp_path / "eye.tif", picture, tile=(64, 64), compression="zlib", photometric="rgb")
    Image.fromarray(picture).save(tmp_path / "eye.png")
    masks = predict(run, [tmp_path / "eye.tif"], tmp_path / "large", min_size=5, quiet=True)
    assert masks == [tmp_path / "large" / "eye_mask.tif"]
    again = predict(run, [tmp_path / "eye.png"], tmp_path / "png", min_size=5, quiet=True)
    assert Image.open(again[0]).size == (133, 150)
    with pytest.raises(UserError, match="--gif"):
        predict(run, [tmp_path / "eye.tif"], tmp_path / "gif", gif=True, quiet=True)
    with pytest.raises(UserError, match="--min-size above"):
        predict(run, [tmp_path / "eye.tif"], tmp_path / "gif", min_size=5000, quiet=True)
    with pytest.raises(UserError, match="--truth"):
        predict(run, [tmp_path / "eye.tif"], tmp_path / "gif", truth=masks[0], quiet=True)
    assert not (tmp_path / "gif").exists()
    monkeypatch.setattr(prediction, "LARGE", 10**9)
    predict(run, [tmp_path / "eye.png"], tmp_path / "small", min_size=5, quiet=True)
    for name in ("mask", "probability"):
        with tifffile.TiffFile(tmp_path / "large" / f"eye_{name}.tif") as file:
            assert file.pages.first.is_tiled
            assert file.pages.first.compression == 8
            large = file.asarray()
        small = np.array(Image.open(tmp_path / "small" / f"eye_{name}.png"))
        assert large.dtype == (np.uint8 if name == "mask" else np.uint16)
        np.testing.assert_allclose(large.astype(int), small.astype(int), atol=0 if name == "mask" else 2)
    assert not [path for path in (tmp_path / "large").iterdir() if path.name.startswith(".")]


def test_of_several_classes_the_index_and_the_probability_of_the_one_chosen_are_written(
    three_classes, tmp_path, tiny_limit, monkeypatch
):
    picture, run = make_retina(3, (150, 133)).image, without_view_diameter(three_classes, tmp_path / "run")
    monkeypatch.setattr(prediction, "STRIP", 56)
    tifffile.imwrite(tmp_path / "eye.tif", picture, tile=(64, 64), compression="zlib", photometric="rgb")
    Image.fromarray(picture).save(tmp_path / "eye.png")
    predict(run, [tmp_path / "eye.tif"], tmp_path / "large", quiet=True)
    monkeypatch.setattr(prediction, "LARGE", 10**9)
    predict(run, [tmp_path / "eye.png"], tmp_path / "small", quiet=True)
    for name in ("mask", "probability"):
        large = tifffile.imread(tmp_path / "large" / f"eye_{name}.tif").astype(int)
        small = np.array(Image.open(tmp_path / "small" / f"eye_{name}.png")).astype(int)
        np.testing.assert_allclose(large, small, atol=0 if name == "mask" else 2)
        assert name != "mask" or set(np.unique(large)) == {0, 1, 2}
    probability = torch.randn(3, 8, 9, generator=torch.Generator().manual_seed(0)).softmax(0)
    classes, files = prediction.render(probability)
    np.testing.assert_array_equal(classes, probability.argmax(0))
    levels = np.array(Image.open(io.BytesIO(files["_probability.png"])))
    np.testing.assert_array_equal(levels, (probability.amax(0).double() * 65535).round())
    deep = np.full((8, 9, 3), 0.5, np.float32)
    photo, grey, colours = prediction.frames(deep, probability, classes)
    assert (photo == 128).all()
    np.testing.assert_array_equal(grey[..., 1], (probability.amax(0) * 255).round())
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == len(np.unique(classes))


def test_a_binary_mask_large_or_small_has_the_colours_of_the_set(trained_run, tmp_path, tiny_limit, monkeypatch):
    run, palette = without_view_diameter(trained_run, tmp_path / "run"), ("#000000", "#ff8000")
    config = load_config(run / "config.yaml")
    config.data.mask_values, config.data.palette = "colours", palette
    (run / "config.yaml").write_text(dump_config(config))
    picture = make_retina(3, (150, 133)).image
    tifffile.imwrite(tmp_path / "eye.tif", picture, tile=(64, 64), compression="zlib", photometric="rgb")
    (mask,) = predict(run, [tmp_path / "eye.tif"], tmp_path / "out", quiet=True)
    values = images.read_mask_values(mask, colours=True)
    assert set(np.unique(values)) == {0, 0xFF8000}
    assert set(np.unique(images.decode_mask(values, images.find_palette([mask])))) == {0, 1}
    monkeypatch.setattr(prediction, "LARGE", 10**9)
    (small,) = predict(run, [tmp_path / "eye.tif"], tmp_path / "out", quiet=True)
    with Image.open(small) as picture:
        assert (picture.format, picture.mode, set(np.unique(picture))) == ("PNG", "P", {0, 1})
    np.testing.assert_array_equal(images.read_mask_values(small, colours=True), values)


def test_a_retina_twice_as_large_gives_nearly_the_same_mask():
    opened = load_run(Path(__file__).parents[2] / "checkpoints" / "drive-cpu-20min")
    small = np.pad(make_retina(5, (280, 270)).image, ((10, 10), (20, 20), (0, 0)))
    large = cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    opened.model.view_diameter = float(images.view_diameter(images.field_of_view(small)))
    masks = [predict_image(opened.model, image, torch.device("cpu"), False).numpy() >= 0.5 for image in (small, large)]
    masks[1] = masks[1][::2, ::2]
    overlap = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
    assert masks[0].any()
    opened.model.view_diameter = None
    unscaled = predict_image(opened.model, large, torch.device("cpu"), False).numpy()[::2, ::2] >= 0.5
    plain = 2 * (masks[0] & unscaled).sum() / (masks[0].sum() + unscaled.sum())
    assert overlap > 0.85 > plain


def test_a_field_of_view_of_about_the_right_size_is_left_as_it_is():
    model, view = network(), np.zeros((100, 120), bool)
    view[5:85, 20:101] = True
    for diameter, factor in ((None, 1), (80.0, 1), (75.0, 1), (54.0, 54 / 81), (162.0, 2)):
        model.view_diameter = diameter
        assert scale_of(model, view) == factor
    assert scale_of(model, np.ones((9, 9), bool)) == 1
