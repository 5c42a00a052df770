from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_helpers.catalogue import MEANINGS
from unet_helpers.config import UserError
from unet_helpers.datasets import find_samples, load_sample
from unet_helpers.evaluation import evaluate
from unet_helpers.metrics import level
from unet_helpers.model import UNet
from unet_helpers.prediction import find_truths, mirror_border, predict, predict_logits, predict_probabilities
from unet_helpers.runs import load_run
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


def test_predict_and_evaluate_give_the_same_result(trained_run, tmp_path):
    """The same images as files: counts from the masks written give the Dice that `evaluate` reports."""
    config = load_run(trained_run).config.data
    samples = [sample for sample in find_samples(config) if sample.split == "test"]
    tp = fp = fn = 0
    (tmp_path / "in").mkdir()
    truths = {}
    for sample in samples:
        image, truths[sample.name] = load_sample(sample)
        Image.fromarray(image).save(tmp_path / "in" / f"{sample.name}.png")
    predict(trained_run, [tmp_path / "in"], tmp_path / "out", quiet=True)
    for name, truth in truths.items():
        mask = np.array(Image.open(tmp_path / "out" / f"{name}_mask.png")) == 255
        tp += (mask & (truth == 1)).sum()
        fp += (mask & (truth == 0)).sum()
        fn += (~mask & (truth == 1)).sum()
    assert evaluate(trained_run)["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)


def test_given_the_truth_error_maps_are_written(trained_run, photographs, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for seed, size in ((1, (64, 64)), (2, (50, 71))):
        Image.fromarray(make_retina(seed, size).vessels).save(masks / f"eye{seed}_manual1.png")
    predict(trained_run, [photographs], tmp_path / "out", truth=masks, quiet=True)
    picture = np.array(Image.open(tmp_path / "out" / "eye2_errors.png"))
    assert picture.shape == (50, 71, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1


def test_wrong_inputs_end_before_anything_is_written(trained_run, photographs, tmp_path):
    output = tmp_path / "out"
    (photographs / "zz.png").write_text("no picture")
    with pytest.raises(UserError, match=r"zz\.png"):
        predict(trained_run, [photographs], output, quiet=True)
    (photographs / "zz.png").unlink()
    Image.new("L", (9, 9)).save(tmp_path / "eye1.png")
    with pytest.raises(UserError, match="overwrite"):
        predict(trained_run, [photographs, tmp_path / "eye1.png"], output, quiet=True)
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


def test_ground_truth_in_the_form_of_a_public_set(tmp_path):
    """RITE's colours, and CamVid's labels of which 11 is void: as the data set itself reads them."""
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)).save(tmp_path / "a.png")
    assert find_truths([tmp_path / "a.png"], tmp_path / "a.png", MEANINGS["rite"])[tmp_path / "a.png"].tolist() == [
        [1, 2, 255]
    ]
    Image.fromarray(np.array([[0, 10, 11]], np.uint8)).save(tmp_path / "b.png")
    assert find_truths([tmp_path / "b.png"], tmp_path / "b.png", MEANINGS["camvid"])[tmp_path / "b.png"].tolist() == [
        [0, 10, 255]
    ]
