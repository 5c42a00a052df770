import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.morphology import skeletonize

from unet_helpers import metrics
from unet_helpers import scores as formulas
from unet_helpers.config import DataConfig, UserError, dump_config, load_config
from unet_helpers.datasets import WholeImages, find_samples, load_sample
from unet_helpers.evaluation import (
    Evaluation,
    choose_threshold,
    compare,
    evaluate,
    predictions,
    samples_of,
    score_images,
    score_run,
    summarise,
)
from unet_helpers.prediction import predict
from unet_helpers.runs import load_run
from unet_helpers.sample_data import make_retina
from unet_helpers.training import train

CPU = torch.device("cpu")
KEYS = (
    "dice", "iou", "sensitivity", "specificity", "precision", "accuracy", "mcc", "roc_auc", "pr_auc", "cldice",
    "threshold", "dice_ci95", "per_image_dice", "tta", "n_images", "n_pixels",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Retinas as files, with a test split of their own; masks hold 0, 1 and, outside the field of view, 255."""
    root = tmp_path / "set"
    for number, split in enumerate(["train"] * 4 + ["test"] * 3):
        data = DataConfig(sample_images=(7, 1, 1), sample_size=64)
        image, mask = load_sample(find_samples(data)[number])
        for kind, picture in (("images", image), ("masks", mask)):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / split / kind / f"eye{number}.png")
    return root


def test_scores_agree_with_a_second_implementation_on_the_files_that_predict_wrote(trained_run, folder, tmp_path):
    """scikit-learn on the 16-bit probabilities, pooled over all pixels that are not 255."""
    data = DataConfig(name="folder", root=str(folder))
    scores = evaluate(trained_run, data)
    predict(trained_run, [folder / "test" / "images"], tmp_path / "out", quiet=True)
    truth, probability, per_image, skeletons = [], [], [], np.zeros(4)
    for path in sorted((folder / "test" / "masks").iterdir()):
        mask = np.array(Image.open(path))
        grey = np.array(Image.open(tmp_path / "out" / f"{path.stem}_probability.png")).astype(np.float64) / 65535
        valid = mask != 255
        said = grey >= scores["threshold"]
        per_image.append(sklearn.metrics.f1_score(mask[valid], said[valid]))
        bones, true_bones = skeletonize(said & valid), skeletonize(mask == 1)
        skeletons += [(bones & (mask == 1)).sum(), bones.sum(), (true_bones & said).sum(), true_bones.sum()]
        truth.append(mask[valid])
        probability.append(grey[valid])
    truth, probability = np.concatenate(truth), np.concatenate(probability)
    said = probability >= scores["threshold"]
    precision, sensitivity = skeletons[0] / skeletons[1], skeletons[2] / skeletons[3]
    expected = {
        "dice": sklearn.metrics.f1_score(truth, said),
        "iou": sklearn.metrics.jaccard_score(truth, said),
        "sensitivity": sklearn.metrics.recall_score(truth, said),
        "specificity": sklearn.metrics.recall_score(truth, said, pos_label=0),
        "precision": sklearn.metrics.precision_score(truth, said),
        "accuracy": sklearn.metrics.accuracy_score(truth, said),
        "mcc": sklearn.metrics.matthews_corrcoef(truth, said),
        "roc_auc": sklearn.metrics.roc_auc_score(truth, probability),
        "pr_auc": sklearn.metrics.average_precision_score(truth, probability),
        "cldice": 2 * precision * sensitivity / (precision + sensitivity),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert list(scores["per_image_dice"].values()) == pytest.approx(per_image, abs=1e-9)
    assert scores["mean_image_dice"] == pytest.approx(np.mean(per_image), abs=1e-9)
    assert scores["mean_image_dice"] != scores["dice"]
    assert scores["n_pixels"] == len(truth)
    assert scores["n_images"] == 3


def test_noise_for_test_labels_changes_no_choice(folder, tmp_path, small_config):
    """Of two folds and of both as an ensemble: settings, epoch, weights, threshold."""
    small_config.data = DataConfig(name="folder", root=str(folder), folds=2)

    def choices(run: Path) -> list:
        for fold in range(2):
            small_config.data.fold = fold
            train(small_config, run / f"fold{fold}", quiet=True)
        paths = sorted(path for path in run.rglob("*") if path.name in ("config.yaml", "model.safetensors"))
        told = [json.loads(path.read_text()) | {"seconds": 0} for path in sorted(run.rglob("metrics.json"))]
        assert len(paths) == 2 * len(told) == 4
        return [[path.read_bytes() for path in paths], json.dumps(told), load_run(run).threshold]

    before, honest = choices(tmp_path / "before"), evaluate(tmp_path / "before")["dice"]
    rng = np.random.default_rng(0)
    for path in (folder / "test" / "masks").iterdir():
        Image.fromarray(rng.integers(0, 2, (64, 64), dtype=np.uint8)).save(path)
    assert choices(tmp_path / "after") == before
    assert evaluate(tmp_path / "after")["dice"] != honest  # the noise was indeed read when testing


def test_the_threshold_comes_from_validation_images_only(trained_run):
    opened = load_run(trained_run)
    images = WholeImages(samples_of(opened.config, "val"), opened.config)
    assert choose_threshold(opened.model, images, torch.device("cpu")) == opened.threshold
    dice = [
        score_images(opened.model, images, 1, torch.device("cpu"), threshold).table.scores(threshold)["dice"]
        for threshold in (opened.threshold, opened.threshold - 0.02, opened.threshold + 0.02)
    ]
    assert max(dice) == dice[0]


def test_all_keys_are_there_and_saving_counts_the_reading(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    scores = evaluate(tmp_path / "run")
    assert set(KEYS) <= set(scores)
    assert "test" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    for reads in (1, 2):
        evaluate(tmp_path / "run", save=True)
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["reads"] == {"test": reads}
    assert metrics["test"]["dice"] == pytest.approx(scores["dice"])
    assert load_run(tmp_path / "run").threshold == scores["threshold"]
    low, high = scores["dice_ci95"]
    assert low <= scores["dice"] <= high


def test_without_anything_to_find_scores_are_undefined_with_a_reason(trained_run, folder):
    for path in (folder / "test" / "masks").iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    data = DataConfig(name="folder", root=str(folder), mask_values="classes")
    scores = evaluate(trained_run, data)
    assert np.isnan(scores["sensitivity"])
    assert np.isnan(scores["roc_auc"])
    assert "ground truth" in scores["undefined"]["sensitivity"]
    assert scores["dice"] == 0  # something was found where there is nothing


def test_pixels_marked_255_never_count(trained_run, folder, tmp_path):
    """All labels outside a small window set to 255: the scores are those of the window."""
    predict(trained_run, [folder / "test" / "images"], tmp_path / "out", quiet=True)
    truth, grey = [], []
    data = DataConfig(name="folder", root=str(folder), mask_values="classes")
    for path in (folder / "test" / "masks").iterdir():
        mask = np.array(Image.open(path))
        window = np.full_like(mask, 255)
        window[20:40, 20:50] = mask[20:40, 20:50]
        Image.fromarray(window).save(path)
        truth.append(mask[20:40, 20:50])
        grey.append(np.array(Image.open(tmp_path / "out" / f"{path.stem}_probability.png"))[20:40, 20:50])
    truth, grey, scores = np.ravel(truth), np.ravel(grey), evaluate(trained_run, data)
    said = grey >= scores["threshold"] * 65535
    assert scores["n_pixels"] == 3 * 20 * 30
    assert scores["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, said))
    assert scores["accuracy"] == pytest.approx((truth == said).mean())
    assert scores["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, grey))


def test_several_classes(small_config, tmp_path):
    small_config.data.labels = "artery_vein"
    small_config.model.num_classes = 3
    small_config.training = replace(small_config.training, epochs=1)
    train(small_config, tmp_path / "run", quiet=True)
    scores = evaluate(tmp_path / "run")
    assert set(KEYS) <= set(scores)
    assert scores["dice"] == pytest.approx(np.nanmean(scores["per_class"]["dice"]))
    assert scores["threshold"] is None
    assert scores["accuracy"] == scores["correct"] / scores["total"]
    assert "binary" in scores["undefined"]["cldice"]


def test_draws_without_a_class_do_not_count_in_its_interval():
    """Of ten images two hold class 2, half of it found; in the others there are a few false alarms."""
    counts = np.tile([[9000, 90, 90, 820], [700, 80, 80, 9140], [0, 2, 0, 9998]], (10, 1, 1))
    counts[:2, 2] = [[40, 2, 60, 9898], [60, 2, 40, 9898]]
    names, table = [f"{number}" for number in range(10)], metrics.ConfusionMatrix(3)
    table.table = torch.tensor([[9000, 90, 2], [90, 700, 2], [5, 5, 100]])
    histograms = [metrics.BinaryHistogram() for _ in range(3)]
    summary = summarise(Evaluation(3, ["a", "b", "c"], names, table, histograms, names, list(counts)), None, True)
    low, high = summary["per_class_dice_ci95"][2]
    assert formulas.dice([40, 20, 60, 0]) <= low < formulas.dice(counts[:, 2].sum(0)) < high
    absent = counts.copy()
    absent[:2, 2] = [0, 2, 0, 9998]
    summary = summarise(Evaluation(3, ["a", "b", "c"], names, table, histograms, names, list(absent)), None, True)
    assert np.isnan(summary["per_class_dice_ci95"][2]).all()


def test_areas_of_several_classes_are_means_over_one_class_against_the_rest(three_classes):
    scores, opened = evaluate(three_classes), load_run(three_classes)
    images = WholeImages(samples_of(opened.config, "test"), opened.config)
    seen = [(p[:, mask != 255], mask[mask != 255]) for p, mask, _ in predictions(opened.model, images, CPU, True)]
    probability, truth = torch.cat([p for p, _ in seen], 1), torch.cat([mask for _, mask in seen])
    for name, area in (("roc_auc", sklearn.metrics.roc_auc_score), ("pr_auc", sklearn.metrics.average_precision_score)):
        by_class = [area(truth == k, (probability[k].double() * 65535).round()) for k in range(3)]
        assert scores[name] == pytest.approx(np.mean(by_class), abs=1e-6)


def test_objects_that_are_not_thin_have_no_cldice(trained_run, tmp_path):
    for name, colour in (("images", (90, 90, 90)), ("masks", 255)):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        picture = Image.new("RGB" if name == "images" else "L", (300, 300), colour)
        picture.save(tmp_path / "data" / "test" / name / "a.png")
    scores = evaluate(trained_run, DataConfig(name="folder", root=str(tmp_path / "data"), mask_values="binary"))
    assert np.isnan(scores["cldice"])
    assert scores["undefined"]["cldice"] == "the objects are not thin"


def test_a_run_compared_with_itself_is_not_better(trained_run):
    result = compare(trained_run, trained_run)
    assert result["difference"] == result["low"] == result["high"] == 0
    assert not result["better"]


def test_runs_that_saw_other_images_or_classes_cannot_be_compared(trained_run, three_classes, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = load_config(trained_run / "config.yaml")
    config.data.sample_images = (5, 3, 2)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    for other in (tmp_path / "run", three_classes):
        with pytest.raises(UserError, match=f"{other} cannot be compared"):
            compare(trained_run, other)


def test_two_runs_differ_by_the_difference_of_their_scores(trained_run, small_config, tmp_path):
    small_config.training = replace(small_config.training, epochs=1, steps_per_epoch=1, learning_rate=1e-9)
    train(small_config, tmp_path / "untrained", quiet=True)
    a, b = evaluate(trained_run)["dice"], evaluate(tmp_path / "untrained")["dice"]
    assert compare(trained_run, tmp_path / "untrained")["difference"] == pytest.approx(a - b)


def test_each_of_two_runs_that_are_compared_sees_pictures_as_in_its_own_training(trained_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained_run, other)
    config = load_config(other / "config.yaml")
    config.data.normalisation, config.data.longest_side = "imagenet", 50
    (other / "config.yaml").write_text(dump_config(config))
    a, b = evaluate(trained_run)["dice"], evaluate(other)["dice"]
    assert a != b
    data = load_config(trained_run / "config.yaml").data
    assert evaluate(other, data)["dice"] == b
    assert compare(trained_run, other, data)["difference"] == pytest.approx(a - b)


def test_a_network_is_not_scored_against_other_classes(three_classes, folder):
    with pytest.raises(UserError, match=r"knows background, artery, vein: not the classes of drive"):
        score_run(three_classes, DataConfig("drive", str(folder)), "test")


def test_an_empty_split_is_refused(trained_run, folder):
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match="split test holds no images"):
        evaluate(trained_run, DataConfig(name="folder", root=str(folder), test_share=0.0))


def test_scores_on_another_data_set_do_not_replace_those_of_the_runs_own(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    evaluate(run, split="test", save=True)
    own = json.loads((run / "metrics.json").read_text())["test"]
    folder = tmp_path / "set"
    for number in range(3):
        retina = make_retina(number, 48)
        for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
            (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / "test" / kind / f"{number}.png")
    evaluate(run, DataConfig(name="folder", root=str(folder)), "test", save=True)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"] == own
    assert metrics["set_test"]["n_images"] == 3
    assert metrics["reads"] == {"test": 1, "set_test": 1}


def test_scores_on_another_folder_do_not_replace_those_of_the_one_trained_on(folder, small_config, tmp_path):
    small_config.data = DataConfig(name="folder", root=str(folder), val_share=0.25)
    train(small_config, tmp_path / "run", quiet=True)
    shutil.copytree(folder, tmp_path / "other")
    for root in (folder, tmp_path / "other", folder / ".." / "set"):  # the last one is the first
        evaluate(tmp_path / "run", replace(small_config.data, root=str(root)), save=True)
    assert load_run(tmp_path / "run").metrics["reads"] == {"test": 2, "other_test": 1}


def test_a_run_is_no_judge_of_images_that_it_was_trained_on(folder, small_config, tmp_path):
    """As DRIVE's four validation images for a run with another `split_seed`, and a folder that has grown."""
    small_config.data = DataConfig(name="folder", root=str(folder), folds=2)
    train(small_config, tmp_path / "run", quiet=True)
    assert evaluate(tmp_path / "run", split="val")["n_images"] == 2
    assert evaluate(tmp_path / "run", split="train")["n_images"] == 2
    other = replace(small_config.data, fold=1)
    for root in (str(folder), f"{folder}/../set"):
        with pytest.raises(UserError, match=r"run: was trained on train/eye\d, which is in the split val"):
            compare(tmp_path / "run", tmp_path / "run", replace(other, root=root), "val")
    shutil.copytree(folder, tmp_path / "other")
    assert evaluate(tmp_path / "run", replace(other, root=str(tmp_path / "other")), "val")["n_images"] == 2


def test_scores_are_counted_at_native_size(trained_run, folder, tmp_path):
    """A run whose images were reduced: scikit-learn on what `predict` wrote, which has the size of the files."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("longest_side: null", "longest_side: 48"))
    data = DataConfig(name="folder", root=str(folder), longest_side=48)
    scores = evaluate(run, data)
    predict(run, [folder / "test" / "images"], tmp_path / "out", quiet=True)
    truth, said = [], []
    for path in sorted((folder / "test" / "masks").iterdir()):
        mask, mine = (np.array(Image.open(p)) for p in (path, tmp_path / "out" / f"{path.stem}_mask.png"))
        truth.append(mask[mask != 255])
        said.append(mine[mask != 255] > 0)
    assert mine.shape == (64, 64)
    truth, said = np.concatenate(truth), np.concatenate(said)
    assert scores["n_pixels"] == len(truth)
    assert scores["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, said), abs=1e-12)
    assert scores["dice"] != evaluate(trained_run, replace(data, longest_side=None))["dice"]


def write_classes(root, masks):
    for number, mask in enumerate(masks):
        image = make_retina(number, 64).image
        for kind, picture in (("images", image), ("masks", mask)):
            (root / "test" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / "test" / kind / f"car{number // 2}__{number}.png")
    return DataConfig(name="folder", root=str(root), mask_values="classes")


def test_classes_absent_from_the_truth_are_left_out_and_named(three_classes, tmp_path):
    masks = [np.where(make_retina(number, 64).artery_vein == 2, 0, 1).astype(np.uint8) for number in range(3)]
    scores = evaluate(three_classes, write_classes(tmp_path, masks))
    assert scores["absent"] == ["class 2"]
    assert scores["classes"] == ["class 0", "class 1", "class 2"]
    assert scores["iou"] == pytest.approx(np.mean(scores["per_class"]["iou"][:2]))
    assert np.sum(scores["confusion"]) == scores["n_pixels"] == 3 * 64 * 64
    assert np.sum(scores["confusion"][2]) == 0
    for (low, high), value in list(zip(scores["per_class_dice_ci95"], scores["per_class"]["dice"], strict=True))[:2]:
        assert low <= value <= high


def test_an_image_that_is_all_void_changes_no_score(trained_run, three_classes, tmp_path):
    for run, kind, own in ((three_classes, "artery_vein", ("confusion", "per_class")), (trained_run, "vessels", ())):
        masks, folder = [getattr(make_retina(number, 64), kind) for number in range(2)], tmp_path / kind
        plain = evaluate(run, write_classes(folder / "a", masks))
        void = evaluate(run, write_classes(folder / "b", [*masks, np.full((64, 64), 255, np.uint8)]))
        for name in ("dice", "iou", "accuracy", "mcc", "cldice", "roc_auc", "n_pixels", "mean_image_dice", *own):
            np.testing.assert_equal(void[name], plain[name], name)
        *seen, nothing = void["per_image_dice"].values()
        assert seen == list(plain["per_image_dice"].values())
        assert np.isnan(nothing)


def test_scores_by_group_are_those_of_its_images_alone(trained_run, three_classes, tmp_path):
    masks = [make_retina(number, 64).artery_vein for number in range(4)]
    for run, folder in ((three_classes, "classes"), (trained_run, "binary")):
        data = write_classes(tmp_path / folder, masks if run is three_classes else [np.minimum(m, 1) for m in masks])
        both = evaluate(run, data)["per_group"]
        assert list(both) == ["car0", "car1"]
        for path in sorted((tmp_path / folder).rglob("car1*")):
            path.unlink()
        alone = evaluate(run, data)
        assert both["car0"] == {"dice": alone["dice"], "iou": alone["iou"]}
    assert evaluate(trained_run)["per_group"] == {}  # every image is a group of its own


def test_intervals_draw_groups_as_views_of_one_car_are_no_independent_images(trained_run, three_classes, tmp_path):
    """Each car photographed three times and all alike: nothing is known that one photograph would not have told."""
    masks = [make_retina(number, 64).artery_vein for number in range(4)]
    for run in (three_classes, trained_run):
        root = tmp_path / run.name
        data = write_classes(root, masks if run is three_classes else [np.minimum(mask, 1) for mask in masks])
        data.group_pattern = ".*__(.).*"
        once, difference_once = evaluate(run, data), compare(run, shifted(run, root), data)
        for path in sorted(root.rglob("test/*/*.png")):
            for view in "bc":
                shutil.copy(path, path.with_stem(path.stem + view))
        thrice = evaluate(run, data)
        assert thrice["n_images"] == 12
        assert list(thrice["per_group"]) == ["0", "1", "2", "3"]
        for name in ("dice_ci95", "per_class_dice_ci95") if run is three_classes else ("dice_ci95",):
            assert np.ravel(thrice[name]).tolist() == np.ravel(once[name]).tolist()
        assert compare(run, shifted(run, root), data) == difference_once
        data.group_pattern = "(.).*"
        alone = evaluate(run, data)
        assert np.isnan(alone["dice_ci95"]).all()
        assert alone["undefined"]["dice_ci95"] == formulas.ONE_IMAGE


def shifted(run, folder):
    """A run whose network is less sure of the background, to compare with."""
    other = folder.with_name(f"{folder.name}-shifted")
    if not other.exists():
        shutil.copytree(run, other)
        weights = load_file(other / "model.safetensors")
        weights["head.bias"][-1] += 1
        save_file(weights, other / "model.safetensors")
    return other


def test_what_predict_wrote_scores_exactly_1_against_itself(three_classes, trained_run, tmp_path):
    for run, num_classes in ((trained_run, 1), (three_classes, 3)):
        root = tmp_path / str(num_classes)
        for kind in ("images", "masks"):
            (root / "test" / kind).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(make_retina(number, 61).image[:, :50]).save(root / "test" / "images" / f"{number}.png")
        for path in predict(run, [root / "test" / "images"], tmp_path / f"out{num_classes}", quiet=True):
            shutil.copy(path, root / "test" / "masks" / path.name)
        scores = evaluate(run, DataConfig(name="folder", root=str(root)))
        assert scores["dice"] == scores["iou"] == 1
        if num_classes == 3:
            assert scores["per_class"]["dice"] == [1, 1, 1]
            assert (tmp_path / "out3" / "legend.png").is_file()


@pytest.mark.parametrize("flips", [False, "horizontal", True])
def test_predictions_are_averaged_over_the_mirror_images_of_training_only(trained_run, tmp_path, flips):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("flips: true", f"flips: {str(flips).lower()}"))
    opened = load_run(run)
    assert opened.config.augmentation.flips == flips
    assert evaluate(run)["tta"] == flips
    assert evaluate(run, flips=False)["tta"] is False
    images = WholeImages(samples_of(opened.config, "test"), opened.config)
    expected = []
    for image, _, _ in images:
        views = {False: [[]], "horizontal": [[], [2]], True: [[], [1], [2], [1, 2]]}[flips]
        with torch.no_grad():
            parts = [opened.model(image.flip(dims)[None]).sigmoid()[0, 0].flip([d - 1 for d in dims]) for dims in views]
        expected.append(torch.stack(parts).mean(0) * (image != 0).any(0))
    found = [probability for probability, *_ in predictions(opened.model, images, torch.device("cpu"), flips=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for index, sample in enumerate(images.samples):
        Image.fromarray(load_sample(sample)[0]).save(tmp_path / f"{index}.png")
    predict(run, [tmp_path / f"{index}.png" for index in range(3)], tmp_path / "out", quiet=True)
    for index, probability in enumerate(expected):
        written = np.array(Image.open(tmp_path / "out" / f"{index}_probability.png")) / 65535
        np.testing.assert_allclose(written, probability, atol=1e-4)


@pytest.mark.parametrize("options", [{"flips": "rotations", "min_size": 9}, {"flips": False, "min_size": 4}])
def test_predict_and_evaluate_agree_on_every_option(trained_run, three_classes, tmp_path, options):
    for run, number in ((trained_run, 1), (three_classes, 3)):
        masks = [make_retina(index, 64).artery_vein for index in range(2)]
        data = write_classes(tmp_path / str(number), masks if number == 3 else [np.minimum(m, 1) for m in masks])
        scores = evaluate(run, data, **options)
        predict(run, [tmp_path / str(number) / "test" / "images"], tmp_path / f"out{number}", quiet=True, **options)
        said = [np.array(Image.open(path)) for path in sorted((tmp_path / f"out{number}").glob("*_mask.png"))]
        said = np.stack(said) > 0 if number == 1 else np.stack(said)
        truth = np.stack(masks)
        truth = np.minimum(truth, 1) if number == 1 else truth
        counted = sklearn.metrics.confusion_matrix(truth[truth != 255], said[truth != 255])
        assert scores["correct"] == counted.trace()
        assert scores["min_size"] == options["min_size"]
        assert scores["correct"] != evaluate(run, data, flips=options["flips"])["correct"]
