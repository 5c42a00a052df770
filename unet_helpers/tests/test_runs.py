import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from unet_helpers import runs
from unet_helpers.catalogue import class_names
from unet_helpers.config import Config, DataConfig, ModelConfig, UserError, dump_config, load_config
from unet_helpers.datasets import WholeImages
from unet_helpers.evaluation import choose_threshold, evaluate, samples_of
from unet_helpers.model import build_model
from unet_helpers.prediction import predict_probabilities
from unet_helpers.runs import COLUMNS, Progress, export, load_run, new_run, read_history, write_history
from unet_helpers.sample_data import make_retina
from unet_helpers.system import read_tensors, write_tensors

needs_torch_29 = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 9), reason="needs torch 2.9"
)


@pytest.fixture
def run(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_opened_with_its_weights_in_evaluation_mode(run):
    opened = load_run(run)
    assert not opened.model.training
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in opened.model.state_dict().items())
    assert opened.threshold == json.loads((run / "metrics.json").read_text())["threshold"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "model.safetensors"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(UserError, match=name):
        load_run(run)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_run(tmp_path / "nowhere")


def test_weights_cut_short_are_named(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_run(run)


def test_weights_of_another_network_are_refused(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["widths"] = [4, 16]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="not fit"):
        load_run(run)
    save_file({"something": torch.zeros(3)}, run / "model.safetensors")
    with pytest.raises(UserError, match="not fit"):
        load_run(run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"threshold": 2}', '{"threshold": "half"}', '{"threshold": null}'])
def test_metrics_without_a_usable_threshold_are_refused(run, text):
    (run / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json"):
        load_run(run)


@pytest.mark.parametrize("value", ['"539"', "NaN", "Infinity", "-5", "true", "[539]", "1" + "0" * 400])
def test_a_field_of_view_that_is_no_size_is_refused(run, value):
    (run / "metrics.json").write_text('{"threshold": 0.5, "view_diameter": %s}' % value)  # noqa: UP031
    with pytest.raises(UserError, match=r"metrics\.json.*view_diameter"):
        load_run(run)


@pytest.mark.parametrize("value", ["5", '[["a"]]', "[1]"])
def test_names_of_training_images_that_are_none_are_refused(run, value):
    (run / "metrics.json").write_text('{"threshold": 0.5, "training_images": %s}' % value)  # noqa: UP031
    with pytest.raises(UserError, match=r"metrics\.json"):
        load_run(run)


def test_opening_a_run_fetches_no_weights(run, monkeypatch):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= {"architecture": "Unet", "encoder": "resnet18", "encoder_weights": "imagenet"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = []
    monkeypatch.setattr(runs, "build_model", lambda model: asked.append(model.encoder_weights) or build_model(model))
    with pytest.raises(UserError, match="not fit"):
        load_run(run)
    assert asked == [None]


def scores(dice):
    values = {"loss": 1.0, "accuracy": 0.5, "correct": 1, "total": 2, "threshold": 0.5}
    return values | {"dice": dice}


def best_after(*dices):
    progress = Progress()
    for epoch, dice in enumerate(dices):
        progress.epoch = epoch
        progress.record(epoch, 0.1, 1.0, 1.0, 1.0, scores(dice))
    return progress.best_epoch


def test_the_best_epoch_is_the_first_with_the_highest_dice():
    nan = float("nan")
    assert best_after(0.1, 0.5, 0.3) == 1
    assert best_after(0.1, 0.5, 0.5) == 1
    assert best_after(0.6, 0.5, 0.3) == 0
    assert best_after(nan, nan, nan) == 2  # nothing to find in the validation images: the latest
    assert best_after(nan, 0.2, 0.1) == 1
    assert best_after(0.0, 0.0, 0.0) == 2  # the same, but false alarms
    assert best_after(0.0, 0.2, 0.0) == 1


def test_a_history_reads_back_what_was_recorded(run):
    first = dict(zip(COLUMNS, (0, 0, 0.0, None, 1.25, 0.5, 7, 14, None, None, None, 0.1), strict=True))
    last = dict(zip(COLUMNS, (1, 80, 3e-3, 1 / 3, 0.7, 13 / 14, 13, 14, 0.62, 0.4999, 25.5, 1e5), strict=True))
    write_history(run, [first, last], draw=False)
    assert repr(read_history(run / "history.csv")) == repr([first, last])  # also whole numbers as such
    (run / "history.csv").write_text("epoch,step\nzero,1\n")
    with pytest.raises(UserError, match=r"history\.csv"):
        read_history(run / "history.csv")


@pytest.fixture
def ensemble(trained_run, tmp_path):
    """The small run, and the same with other weights and another threshold."""
    folder = tmp_path / "ensemble"
    for name in ("a", "b"):
        shutil.copytree(trained_run, folder / name)
    tensors, _ = read_tensors(folder / "b" / "model.safetensors")
    write_tensors(folder / "b" / "model.safetensors", {k: v if "num" in k else v * 0.8 for k, v in tensors.items()})
    metrics = json.loads((folder / "b" / "metrics.json").read_text())
    (folder / "b" / "metrics.json").write_text(json.dumps(metrics | {"threshold": 0.9}))
    return folder


def test_an_ensemble_averages_probabilities_and_thresholds(ensemble):
    joined, *single = [load_run(path) for path in (ensemble, ensemble / "a", ensemble / "b")]
    image = torch.randn(3, 37, 45)
    mean = sum(predict_probabilities(run.model, image) for run in single) / 2
    torch.testing.assert_close(predict_probabilities(joined.model, image), mean, rtol=0, atol=1e-6)
    assert joined.threshold == (single[0].threshold + 0.9) / 2
    assert joined.model.view_diameter == single[0].model.view_diameter > 0


def test_an_ensembles_threshold_is_chosen_on_validation_images_when_asked(ensemble, trained_run, tmp_path):
    metrics = json.loads((ensemble / "a" / "metrics.json").read_text())
    (ensemble / "a" / "metrics.json").write_text(json.dumps(metrics | {"training_images": ["val_000"]}))
    with pytest.raises(UserError, match="trained on"):
        evaluate(ensemble, split="val")
    (ensemble / "a" / "metrics.json").write_text(json.dumps(metrics))
    before = load_run(ensemble).threshold
    for number in range(4):
        retina = make_retina(number, 64)
        for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
            (tmp_path / "other" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "other" / kind / f"{number}.png")
    evaluate(ensemble, DataConfig(name="folder", root=str(tmp_path / "other")), split="val", save=True)
    assert load_run(ensemble).threshold == before  # for other eyes it is not chosen anew
    scores = evaluate(ensemble, split="val", save=True)
    opened = load_run(ensemble)
    assert opened.threshold == scores["threshold"] != before
    images = WholeImages(samples_of(opened.config, "val"), opened.config)
    assert choose_threshold(opened.model, images, torch.device("cpu")) == opened.threshold
    assert evaluate(ensemble)["threshold"] == opened.threshold
    (ensemble / "a" / "metrics.json").write_text(json.dumps(metrics | {"threshold": 0.7}))  # `a` was trained again
    assert load_run(ensemble).threshold == pytest.approx((0.7 + 0.9) / 2)
    assert load_run(ensemble).metrics["reads"] == opened.metrics["reads"]
    (ensemble / "a" / "metrics.json").write_text(json.dumps(metrics))
    assert load_run(ensemble).threshold == opened.threshold
    shutil.copytree(trained_run, ensemble / "c")  # now it is another ensemble
    assert load_run(ensemble).threshold == pytest.approx((2 * load_run(trained_run).threshold + 0.9) / 3)


def test_an_ensemble_does_what_all_of_its_runs_have_seen_and_judges_nothing_that_one_has(ensemble):
    config = load_config(ensemble / "b" / "config.yaml")
    config.augmentation.flips, config.augmentation.rotation = "horizontal", 30.0
    (ensemble / "b" / "config.yaml").write_text(dump_config(config))
    joined = load_run(ensemble).config.augmentation
    assert (joined.flips, joined.rotation) == ("horizontal", 30.0)
    metrics = json.loads((ensemble / "b" / "metrics.json").read_text())
    (ensemble / "b" / "metrics.json").write_text(json.dumps(metrics | {"training_images": ["val_000"]}))
    with pytest.raises(UserError, match="trained on val_000"):
        evaluate(ensemble, split="val")
    (ensemble / "b" / "metrics.json").write_text(json.dumps(metrics | {"view_diameter": 2 * metrics["view_diameter"]}))
    with pytest.raises(UserError, match="are no ensemble"):
        load_run(ensemble)


def test_runs_that_do_not_go_together_are_no_ensemble(ensemble, three_classes):
    shutil.copytree(three_classes, ensemble / "c")
    with pytest.raises(UserError, match=r"model\.num_classes"):
        load_run(ensemble)


def test_runs_whose_classes_have_other_colours_are_no_ensemble(ensemble):
    for name, colours in (("a", ["#000000", "#ff0000"]), ("b", ["#ff0000", "#000000"])):
        path = ensemble / name / "config.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["data"] |= {"name": "folder", "mask_values": "colours", "palette": colours}
        path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"data\.palette"):
        load_run(ensemble)


@needs_torch_29
def test_onnx_agrees_on_odd_sizes_and_knows_what_it_needs(trained_run, tmp_path):
    export(trained_run, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    opened = load_run(trained_run)
    for shape in ((1, 3, 37, 45), (2, 3, 64, 64), (3, 3, 101, 17), (1, 3, 1, 1)):
        image = torch.randn(shape)
        with torch.inference_mode():
            expected = opened.model(image).sigmoid().numpy()
        np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, rtol=0, atol=1e-4)
    known = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert known["threshold"] == opened.threshold
    assert known["classes"] == class_names(opened.config.data, 1)
    assert known["normalisation"] == "image"
    assert known["view_diameter"] == opened.model.view_diameter
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_torch_29
def test_onnx_of_an_ensemble_averages_probabilities_and_names_the_longest_side(tmp_path):
    config, ensemble = Config(data=DataConfig(longest_side=48), model=ModelConfig(widths=(2,))), tmp_path / "ensemble"
    for name, threshold in (("a", 0.25), ("b", 0.75)):
        new_run(ensemble / name, config, resume=False)
        write_tensors(ensemble / name / "model.safetensors", build_model(config.model).state_dict())
        (ensemble / name / "metrics.json").write_text(json.dumps({"threshold": threshold}))
    export(ensemble, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 37, 45)
    with torch.inference_mode():
        mean = sum(load_run(ensemble / name).model(image).sigmoid() for name in ("a", "b")) / 2
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], mean.numpy(), rtol=0, atol=1e-4)
    known = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (known["longest_side"], known["threshold"]) == (48, 0.5)


@needs_torch_29
def test_what_is_exported_gives_a_probability_for_each_class(three_classes, tmp_path, monkeypatch):
    """The network that is handed to torch's exporter, which is trusted to keep it."""
    exported = []

    class Stop(Exception):
        pass

    def export_nothing(network, *arguments, **options):
        exported.append(network)
        raise Stop

    monkeypatch.setattr(torch.onnx, "export", export_nothing)
    with pytest.raises(Stop):
        runs.export(three_classes, tmp_path / "a.onnx")
    image = torch.randn(2, 3, 33, 41)
    expected = load_run(three_classes).model(image).softmax(1)
    torch.testing.assert_close(exported[0](image), expected)


def test_what_cannot_be_exported_says_why(trained_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(torch, "__version__", "2.8.1")
    with pytest.raises(UserError, match=r"torch 2\.8\.1 cannot export .* update it to 2\.9"):
        export(trained_run, tmp_path / "model.onnx")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(UserError, match=r"file: cannot be written"):
        export(trained_run, tmp_path / "file" / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_valid_padding_is_not_exported(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("padding: same", "padding: valid"))
    shutil.copytree(tmp_path / "run", tmp_path / "runs" / "one")
    for run in ("run", "runs"):  # an ensemble, too
        with pytest.raises(UserError, match="valid"):
            export(tmp_path / run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
