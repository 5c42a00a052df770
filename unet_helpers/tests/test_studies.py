import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from PIL import Image

from unet_helpers import studies
from unet_helpers.__main__ import main
from unet_helpers.config import Config, DataConfig, ModelConfig, UserError, dump_config, load_config, to_dict
from unet_helpers.datasets import find_samples
from unet_helpers.evaluation import evaluate
from unet_helpers.runs import load_run
from unet_helpers.sample_data import make_retina
from unet_helpers.scores import widened
from unet_helpers.studies import format_study, load_grid, run_study, summarise_study
from unet_helpers.tests.conftest import SMALL_ENCODER, make_small_config

RNG = np.random.default_rng(0)
COMMITTED = sorted(path.parent for path in Path(__file__).parents[2].glob("checkpoints/study-*/rows.csv"))
IMAGES = [f"eye{number}" for number in range(4)]


def write_grid(study, small_config, **changes) -> None:
    small_config.training.epochs = 1
    base = to_dict(small_config)
    del base["seed"]
    grid = {
        "baseline": "plain",
        "base": base,
        "arms": {
            "plain": {"seeds": 2},
            "wide": {"seeds": 2, "model.widths": [6, 12]},
            "again": {"seeds": [1], "starts_from": "plain"},
        },
    }
    study.mkdir(exist_ok=True)
    (study / "grid.yaml").write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))


def table_of(study) -> list[dict]:
    return summarise_study(studies.read_rows(study, load_grid(study)[0]), *load_grid(study))


@pytest.fixture
def study(tmp_path, small_config):
    write_grid(tmp_path / "study", small_config)
    return tmp_path / "study"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The same study with all its runs; tests must not change it, but work on copies made by `keep`."""
    study = tmp_path_factory.mktemp("studies") / "study"
    write_grid(study, make_small_config())
    run_study(study, quiet=True)
    return study


def keep(finished: Path, study: Path, *arms: str) -> None:
    """Make a study into a copy of the finished one in which these arms alone were run."""
    shutil.copytree(finished, study, dirs_exist_ok=True)
    studies.write_rows(study, [row for row in studies.read_rows(study) if row["arm"] in arms])
    for run in (study / "runs").iterdir():
        if run.name.split("-")[0] not in arms:
            shutil.rmtree(run)


def test_a_row_holds_the_counts_of_each_group_of_images(trained_run, tmp_path):
    """Two photographs of each eye: whoever draws rows' counts as if they were independent images would be too sure."""
    for number in range(8):
        retina = make_retina(number, 64)
        for kind, picture in (("images", retina.image), ("masks", retina.vessels)):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "set" / kind / f"eye{number // 2}__{number}.png")
    config = load_config(trained_run / "config.yaml")
    config.data = DataConfig("folder", str(tmp_path / "set"), mask_values="binary")
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    samples = find_samples(config.data)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics["training_images"] = [sample.name for sample in samples if sample.split == "train"]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    row, scores = studies.score_arm(tmp_path / "run"), evaluate(tmp_path / "run", split="val")
    assert set(row["counts"]) == {sample.group for sample in samples if sample.split == "val"}
    assert scores["n_images"] == 2 * len(row["counts"])
    assert np.sum(list(row["counts"].values())) == scores["n_pixels"]
    assert row["val_dice"] == pytest.approx(scores["dice"])


def test_a_study_trains_what_is_missing_and_nothing_else(finished, study, monkeypatch):
    keep(finished, study, "plain", "wide", "again")
    before, table = (study / "rows.csv").read_text(), format_study(table_of(study))
    monkeypatch.setattr(studies, "train", None)
    rows = run_study(study, quiet=True)
    assert (study / "rows.csv").read_text() == before == (finished / "rows.csv").read_text()
    monkeypatch.undo()

    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("plain", 0), ("plain", 1), ("wide", 0), ("wide", 1), ("again", 1),
    ]  # fmt: skip
    assert (finished / "arms.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        run = load_run(study / "runs" / f"{row['arm']}-{row['seed']}")
        assert run.config.seed == row["seed"]
        assert row["val_dice"] == pytest.approx(run.metrics["val"]["dice"])
        tp, fp, fn, _ = np.sum(list(row["counts"].values()), axis=0)
        assert row["val_dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert row["train_dice"] == pytest.approx(evaluate(run.path, split="train")["dice"])
        assert len(row["val_dice_curve"]) == len(row["train_loss_curve"]) == 2
    again = load_run(study / "runs" / "again-1")
    assert again.config.model.weights == str(finished / "runs" / "plain-1" / "model.safetensors")

    lines = before.splitlines(keepends=True)
    (study / "rows.csv").write_text("".join([lines[0], lines[2], lines[4], lines[5]]))  # a clone has no runs, either
    shutil.rmtree(study / "runs")
    run_study(study, quiet=True)
    assert format_study(table_of(study)) == table
    assert {path.name for path in (study / "runs").iterdir()} == {"plain-0", "wide-0"}


def test_what_an_arm_starts_from_is_trained_where_its_run_is_gone(finished, study):
    keep(finished, study, "plain")
    shutil.rmtree(study / "runs")
    rows = run_study(study, ["again"], quiet=True)
    assert [(row["arm"], row["seed"]) for row in rows] == [("plain", 0), ("plain", 1), ("again", 1)]
    assert {path.name for path in (study / "runs").iterdir()} == {"plain-1", "again-1"}
    with pytest.raises(UserError, match="has no arm none, but plain, wide, again"):
        run_study(study, ["none"])


def test_an_interrupted_arm_goes_on_however_the_study_is_named(finished, study, monkeypatch):
    keep(finished, study, "plain", "again")
    monkeypatch.chdir(study.parent)
    for path in ("study", study):
        for name in ("rows.csv", "runs/again-1/metrics.json"):
            (study / name).unlink()
        assert [row["arm"] for row in run_study(path, ["again"], quiet=True)] == ["again"]


def test_a_run_that_began_from_other_weights_is_not_taken(finished, study, small_config):
    """Its settings name the folder of the weights, which is the same whatever was trained there."""
    keep(finished, study, "plain", "again")
    arms = yaml.safe_load((study / "grid.yaml").read_text())["arms"]
    write_grid(study, small_config, arms=arms | {"plain": {"seeds": 2, "training.learning_rate": 0.02}})
    shutil.rmtree(study / "runs" / "plain-0")
    shutil.rmtree(study / "runs" / "plain-1")
    with pytest.raises(UserError, match=r"again-1: has begun from other weights .* delete that folder"):
        run_study(study, ["plain", "again"], quiet=True)
    shutil.rmtree(study / "runs" / "again-1")
    assert len(run_study(study, ["plain", "again"], quiet=True)) == 3


def test_of_smps_networks_the_encoder_alone_starts_from_another_arm(study, small_config):
    smp = {"seeds": 1, "model.architecture": "Unet", "model.encoder": SMALL_ENCODER}
    write_grid(study, small_config, arms={"plain": smp, "later": {**smp, "starts_from": "plain"}})
    assert [row["arm"] for row in run_study(study, ["later"], quiet=True)] == ["later"]
    model = load_config(study / "runs" / "later-0" / "config.yaml").model
    assert model.encoder_weights == str(study / "runs" / "plain-0" / "model.safetensors")
    assert model.weights is None
    run_study(study, ["later"], quiet=True)  # its row is taken as its own


def test_another_grid_makes_the_rows_of_changed_arms_anew(finished, study, small_config):
    keep(finished, study, "plain", "wide")
    arms = {"plain": {"seeds": 1}, "wide": {"seeds": 2, "model.widths": [5, 12]}}
    write_grid(study, small_config, arms=arms)
    with pytest.raises(UserError, match=r"wide-0: holds a run of other settings .*delete"):
        run_study(study, quiet=True)
    shutil.rmtree(study / "runs")
    rows = run_study(study, quiet=True)
    assert [row["seed"] for row in rows if row["arm"] == "plain"] == [0, 1]  # a row too many is none that is wrong
    assert {path.name for path in (study / "runs").iterdir()} == {"wide-0", "wide-1"}


def test_rows_of_other_grids_and_of_other_processes_stay_in_the_file(finished, study, small_config, monkeypatch):
    keep(finished, study, "wide")
    before = format_study(table_of(study))
    write_grid(study, small_config, arms={"plain": {"seeds": 1}})
    rows = run_study(study, quiet=True)
    assert [row["arm"] for row in rows] == ["plain"]
    write_grid(study, small_config)
    assert format_study(table_of(study)).splitlines()[2] == before.splitlines()[2]
    real, other = studies.score_arm, {"arm": "wide", "seed": 7, "settings": {}}

    def meanwhile(run):
        studies.write_rows(study, [*studies.read_rows(study), rows[0] | other])
        return real(run)

    monkeypatch.setattr(studies, "score_arm", meanwhile)
    run_study(study, ["plain"], quiet=True)
    found = [(row["arm"], row["seed"]) for row in studies.read_rows(study)]
    assert found == [("plain", 0), ("plain", 1), ("wide", 0), ("wide", 1), ("wide", 7)]


def test_a_study_that_was_moved_goes_on(finished, study):
    keep(finished, study, "plain", "again")
    for name in ("rows.csv", "runs/again-1/metrics.json"):
        (study / name).unlink()
    shutil.move(study, study.parent / "moved")
    assert [row["arm"] for row in run_study(study.parent / "moved", ["again"], quiet=True)] == ["again"]


def test_a_study_in_which_there_is_nothing_to_find_can_be_opened_again(finished, study):
    keep(finished, study, "plain")
    studies.write_rows(study, [row | {"val_dice": math.nan} for row in studies.read_rows(study)])
    assert "nan" in format_study(table_of(study))


def test_a_run_that_was_killed_goes_on(study, monkeypatch):
    real = studies.train

    def killed(config, run, **options):
        config.training.epochs = 1
        real(config, run, **options)
        (run / "metrics.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, quiet=True)
    assert not (study / "rows.csv").exists()
    monkeypatch.setattr(studies, "train", real)
    assert len(run_study(study, ["plain"], quiet=True)) == 2


def test_an_arm_whose_encoder_weights_cannot_be_had_is_left_out(study, small_config, tmp_path, capsys):
    missing = {"seeds": 2, "model.architecture": "Unet", "model.encoder_weights": str(tmp_path / "none.pth")}
    later = {"seeds": 1, "model.architecture": "Unet", "starts_from": "pretrained"}
    arms = {"plain": {"seeds": 1}, "pretrained": missing, "later": later, "last": {"seeds": 1}}
    write_grid(study, small_config, arms=arms)
    assert [row["arm"] for row in run_study(study, quiet=True)] == ["plain", "last"]
    said = capsys.readouterr().out
    assert said.count("pretrained: not run here: encoder_weights: there is no file") == 1
    assert said.count("later: not run here: encoder_weights: there is no file") == 1
    assert "pretrained      0  not run here" in format_study(table_of(study))


def test_arms_may_be_called_by_numbers(study, small_config):
    write_grid(study, small_config, baseline=16, arms={16: {"seeds": 1}, 32: {"seeds": 1, "starts_from": 16}})
    arms, baseline = load_grid(study)
    assert (list(arms), baseline, arms["32"].starts_from) == (["16", "32"], "16", "16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "none"}, "baseline none is no arm"),
        ({"arms": {"plain": {}}}, "lacks 'seeds'"),
        ({"arms": {"plain": {"seeds": 0}}}, "arm plain needs a number of seeds"),
        ({"arms": {"plain": {"seeds": ["a"]}}}, "arm plain needs a number of seeds"),
        ({"arms": {"plain": {"seeds": 1, "starts_from": "wide"}}}, "start from an arm above it"),
        ({"arms": {"plain": {"seeds": 1, "model.wide": 3}}}, "arm plain: .*wide"),
        ({"arms": {"plain": {"seeds": 1, "modell.widths": [3]}}}, "modell"),
        ({"arms": {"plain": {"seeds": 1, "training.epochs": -1}}}, "arm plain: training.epochs"),
        ({"arms": ["plain"]}, "no grid"),
        ({"arms": {"plain": 3}}, "no grid"),
        ({"base": [1]}, "no grid"),
        ({"base": {"trainng": {"epochs": 1}}}, "trainng is none of"),
        ({"base": {"seed": 3}}, "seed is none of"),
        ({"bases": {}}, "bases is none of"),
    ],
)
def test_a_wrong_grid_is_named(study, small_config, changes, words):
    write_grid(study, small_config, **changes)
    with pytest.raises(UserError, match=words) as error:
        load_grid(study)
    assert "grid.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_that_came_later_leaves_rows_valid_unless_it_is_used(finished, study):
    keep(finished, study, "plain", "again")
    arms, before = load_grid(study)[0], (study / "rows.csv").read_text()
    assert before.count('""data.normalisation"": ""image""') == 4  # three rows, and what one of them starts from
    (study / "rows.csv").write_text(before.replace('""data.normalisation"": ""image"", ', ""))
    assert len(studies.read_rows(study, arms)) == 3
    (study / "rows.csv").write_text(before.replace('""data.normalisation"": ""image""', '""data.normalisation"": 1', 1))
    assert len(studies.read_rows(study, arms)) == 2


@pytest.mark.parametrize("study", COMMITTED, ids=lambda study: study.name)
def test_committed_rows_belong_to_their_grid(study):
    arms, _ = load_grid(study)
    rows = studies.read_rows(study, arms)
    assert len(rows) == (study / "rows.csv").read_text().count("\n") - 1
    assert all(row["seed"] in arms[row["arm"]].seeds for row in rows)
    assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows)


def test_damaged_files_are_named(study, tmp_path, capsys):
    with pytest.raises(UserError, match=r"grid\.yaml: there is no such settings file"):
        load_grid(tmp_path / "none")
    (study / "rows.csv").write_text("arm,seed,settings\nplain,zero,x\n")
    with pytest.raises(UserError, match=r"rows\.csv: cannot be read"):
        run_study(study)
    (study / "rows.csv").write_bytes(b"\xff\xfe")
    assert main(["study", str(study)]) == 2
    (study / "grid.yaml").write_text("arms: [")
    assert main(["study", str(study)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_seeds_scored_on_other_masks_are_not_averaged(finished, study):
    keep(finished, study, "plain")
    rows = studies.read_rows(study)
    tp, fp, fn, tn = rows[1]["counts"]["val_000"]
    rows[1]["counts"]["val_000"] = [tp + 1, fp - 1, fn, tn]  # a pixel that was called vessel has become one
    studies.write_rows(study, rows)
    with pytest.raises(UserError, match=r"rows\.csv: .*plain.* other masks"):
        run_study(study)
    rows[1]["counts"]["val_000"] = [tp + 1, fp, fn - 1, tn]  # another network's prediction of the same mask
    studies.write_rows(study, rows)
    assert len(studies.read_rows(study, load_grid(study)[0])) == 2


def test_the_command_trains_and_prints_the_table(finished, study, capsys):
    keep(finished, study, "plain")
    (study / "rows.csv").unlink()
    shutil.rmtree(study / "runs" / "plain-1")
    assert main(["study", str(study), "--arms", "plain"]) == 0
    out = capsys.readouterr().out
    assert "wide" in out
    assert out.count("not run here") == 2


def row_of(arm: str, seed: int, dices: np.ndarray) -> dict:
    """A row whose images have these Dice values."""
    positive = 30_000
    counts = np.stack([dices * positive, (1 - dices) * positive, (1 - dices) * positive, 0 * dices + 200_000], -1)
    pooled = counts.sum(0)
    dice = 2 * pooled[0] / (2 * pooled[0] + pooled[1] + pooled[2])
    return {"arm": arm, "seed": seed, "val_dice": dice, "counts": dict(zip(IMAGES, counts.tolist(), strict=True))}


def simulated(rng, shift=0.0, seeds=5, image_noise=0.003, arm_noise=0.0) -> list[dict]:
    """Two arms: images differ by .02, seeds by .003, images from seed to seed and from arm to arm by what is given."""
    images, rows = 0.8 + rng.normal(0, 0.02, 4), []
    for arm, gain in (("one", 0.0), ("two", shift + rng.normal(0, arm_noise, 4) if arm_noise else shift)):
        for seed in range(seeds):
            noise = rng.normal(0, 0.003) + rng.normal(0, image_noise, 4)
            rows.append(row_of(arm, seed, images + gain + noise))
    return rows


def verdicts(repeats: int, seed: int = 1, **options) -> list[str]:
    rng, arms = np.random.default_rng(seed), {"one": None, "two": None}
    with pytest.MonkeyPatch.context() as patch:  # each arm's own interval has no say in the verdict, and takes time
        patch.setattr(studies, "bootstrap_interval", lambda *_: (0.0, 0.0))
        tables = [summarise_study(simulated(rng, **options), arms, "one") for _ in range(repeats)]
    return [table[1]["verdict"] for table in tables]


@pytest.mark.parametrize("image_noise", [0.003, 0.01])
def test_identical_arms_are_rarely_told_apart(image_noise):
    found = verdicts(100, image_noise=image_noise)
    assert found.count("better") + found.count("worse") <= 7


def test_identical_arms_that_differ_by_seeds_alone():
    """The hardest case, as images then say nothing: 5.5% in the long run, and at most 7 of 100 are allowed."""
    found = verdicts(500, image_noise=0.0)
    assert found.count("better") + found.count("worse") <= 35


@pytest.mark.parametrize("seeds", [5, 20])
def test_arms_that_differ_by_image_but_not_on_average_are_rarely_told_apart(seeds):
    """However many seeds there are, four images are four."""
    found = verdicts(100, seeds=seeds, image_noise=0.001, arm_noise=0.01)
    assert found.count("better") + found.count("worse") <= 7


def test_a_difference_far_above_the_noise_is_found_and_not_claimed_with_few_seeds():
    assert verdicts(20, shift=0.015) == ["better"] * 20
    assert verdicts(20, shift=-0.015) == ["worse"] * 20
    assert verdicts(20, shift=0.015, seeds=3) == [""] * 20


def test_the_table_by_hand_and_against_students_t():
    rng = np.random.default_rng(2)
    seeds = 0.8 + rng.normal(0, 0.004, 40)
    rows = [row_of("one", seed, np.full(4, dice)) for seed, dice in enumerate(seeds)]  # images that do not differ
    rows += [row_of("two", seed, np.full(4, dice + 0.01)) for seed, dice in enumerate(seeds[:30])]
    one, two, none = summarise_study(rows, {"one": None, "two": None, "none": None}, "one")
    assert one["mean"] == pytest.approx(seeds.mean())
    assert one["deviation"] == pytest.approx(seeds.std(ddof=1))
    expected = scipy.stats.t.interval(0.95, 39, seeds.mean(), scipy.stats.sem(seeds))
    assert (one["low"], one["high"]) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))
    assert math.isnan(one["difference"])
    assert two["difference"] == pytest.approx(0.01)  # of the same seeds: no noise is left
    assert (two["difference_low"], two["difference_high"]) == pytest.approx((0.01, 0.01))
    assert two["verdict"] == "better"
    assert none["seeds"] == 0
    assert format_study([one, two, none]).endswith("not run here")


def test_arms_scored_on_other_images_are_not_compared():
    rows = simulated(np.random.default_rng(0))
    for row in rows[5:]:
        row["counts"] = {f"other {name}": counts for name, counts in row["counts"].items()}
    assert math.isnan(summarise_study(rows, {"one": None, "two": None}, "one")[1]["difference"])


def test_arms_scored_on_other_masks_are_not_compared():
    rows = simulated(np.random.default_rng(0))
    for row in rows[5:]:  # a hundred more vessel pixels in each image, all missed
        row["counts"] = {name: [tp, fp, fn + 100, tn - 100] for name, (tp, fp, fn, tn) in row["counts"].items()}
    assert math.isnan(summarise_study(rows, {"one": None, "two": None}, "one")[1]["difference"])
    for row in rows[5:]:
        row["counts"] = {name: [counts, counts] for name, counts in row["counts"].items()}  # two classes
    assert math.isnan(summarise_study(rows, {"one": None, "two": None}, "one")[1]["difference"])


def test_images_are_compared_by_name():
    rows = simulated(np.random.default_rng(0))
    expected = summarise_study(rows, {"one": None, "two": None}, "one")
    for row in rows[5:]:
        row["counts"] = dict(reversed(row["counts"].items()))
    assert summarise_study(rows, {"one": None, "two": None}, "one") == expected


def test_several_classes_and_a_single_seed():
    counts = {name: [[90, 5, 5, 0], [0, 0, 10, 90]] for name in IMAGES}
    rows = [{"arm": "one", "seed": seed, "val_dice": 9 / 19, "counts": counts} for seed in range(2)]
    (entry,) = summarise_study(rows, {"one": None}, "one")
    assert (entry["low"], entry["high"]) == pytest.approx(((180 / 190) / 2,) * 2)
    (entry,) = summarise_study(rows[:1], {"one": None}, "one")
    assert entry["mean"] == 9 / 19
    assert math.isnan(entry["deviation"])
    json.dumps(entry)


def test_few_runs_widen_an_interval_as_by_hand():
    # t(.975, 4) = 2.776, times sqrt(5/4) = 3.104, by the normal distribution's 1.960: 1.584
    assert widened(0.5, 0.4, 0.7, 5) == pytest.approx((0.5 - 0.1584, 0.5 + 0.3168), abs=1e-4)
    assert widened(0.5, 0.4, 0.7, 100_000) == pytest.approx((0.4, 0.7), abs=1e-4)


def test_a_large_picture_takes_little_memory():
    """In reduced size: as floats alone, image and what is computed from it take 0.2 GiB, and the network as much."""
    program = """
from unet_helpers import images, prediction, studies
from unet_helpers.config import AugmentationConfig, Config, ModelConfig
images.LARGE = prediction.LARGE = 0
config = Config(model=ModelConfig(widths=(2,)), augmentation=AugmentationConfig(flips=False))
print(studies.measure_large(config, side=2000)["large_memory_gib"])
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    assert 0 < float(result.stdout) < 0.25


def test_a_large_picture_of_several_classes_is_measured():
    assert studies.measure_large(Config(model=ModelConfig(num_classes=3, widths=(2,))), side=64)["large_seconds"] > 0
