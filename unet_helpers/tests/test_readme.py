import json
import re
from pathlib import Path

import pytest

from unet_helpers.config import load_config
from unet_helpers.model import build_model, count_parameters
from unet_helpers.runs import PUBLISHED, load_run, read_history
from unet_helpers.tests.test_notebooks import READMES

ROOT = Path(__file__).parents[2]
RUN = ROOT / "checkpoints" / "drive-cpu-20min"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"^python -m unet_helpers (.*?)(?: +#.*)?$", re.MULTILINE)
COMMANDS = [command for path in READMES for command in SHOWN.findall(path.read_text(encoding="utf-8"))]
COMMANDS = [command for command in dict.fromkeys(COMMANDS) if "--resume" not in command]  # whose run is not here


def test_the_table_holds_the_numbers_of_the_reference_run():
    scores = json.loads((RUN / "metrics.json").read_text())["test"]
    row = next(line for line in TEXT.splitlines() if line.startswith("| **this run**"))
    names = ("dice", "roc_auc", "accuracy", "sensitivity", "specificity", "mcc", "cldice")
    assert [cell.strip() for cell in row.strip("|").split("|")[1:]] == [f"{scores[name]:.4f}" for name in names]
    assert f"**{scores['dice']:.4f}**" in TEXT
    assert "{:.4f} to {:.4f}".format(*scores["dice_ci95"]) in TEXT


def test_the_model_card_holds_the_numbers_of_its_run():
    scores = json.loads((RUN / "metrics.json").read_text())["test"]
    images = scores["per_image_dice"].values()
    cells = [f"{scores['dice']:.4f}", "{:.4f} to {:.4f}".format(*scores["dice_ci95"])]
    cells += [f"{scores[name]:.4f}" for name in ("roc_auc", "sensitivity", "specificity")]
    cells.append(f"{min(images):.4f} and {max(images):.4f}")
    assert f"| {' | '.join(cells)} |" in (RUN / "README.md").read_text(encoding="utf-8")


def test_the_table_of_classes_holds_the_numbers_of_the_run_on_rite():
    scores = json.loads((ROOT / "checkpoints" / "rite" / "metrics.json").read_text())["test"]
    for index, name in ((1, "artery"), (2, "vein")):
        assert scores["classes"][index] == name
        dice, *rest = (f"{scores['per_class'][key][index]:.4f}" for key in ("dice", "sensitivity", "precision"))
        interval = "{:.4f} to {:.4f}".format(*scores["per_class_dice_ci95"][index])
        assert f"| {name} | {' | '.join([dice, interval, *rest])} |" in TEXT
    _, (_, *artery), (_, *vein) = scores["confusion"]
    assert f"{artery[0] / sum(artery):.0%} of an\nartery's pixels and {vein[1] / sum(vein):.0%} of a vein's" in TEXT


def test_the_numbers_of_the_run_on_camvid_stand_in_the_text():
    scores = json.loads((ROOT / "checkpoints" / "camvid" / "metrics.json").read_text())["test"]
    text = " ".join(TEXT.split())
    assert f"Mean IoU **{scores['iou']:.4f}** on the {scores['n_images']} test frames" in text
    pairs = zip(scores["classes"], scores["per_class"]["iou"], strict=True)
    assert ", ".join(f"{name} {value:.4f}" for name, value in pairs) in text
    assert f"it is {scores['per_group']['Seq05VD']['iou']:.4f} (171 frames of Seq05VD)" in text


@pytest.mark.parametrize(("name", "most"), [("drive-cpu-20min", 600_000), ("rite", 600_000), ("camvid", 4_000_000)])
def test_a_reference_run_is_whole_and_its_parts_agree(name, most):
    run = ROOT / "checkpoints" / name
    assert all((run / file).is_file() for file in PUBLISHED)
    opened = load_run(run)
    history = read_history(run / "history.csv")
    assert count_parameters(opened.model) == opened.metrics["parameters"] <= most
    assert opened.metrics["best_epoch"] == max(history, key=lambda row: row["val_dice"])["epoch"]
    assert opened.metrics["steps"] == history[-1]["step"]
    assert opened.config.data.root == "data"
    assert count_parameters(build_model(load_config(run / "config.yaml").model)) == opened.metrics["parameters"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_shown_are_understood(command, monkeypatch):
    from unet_helpers.__main__ import parse

    monkeypatch.chdir(ROOT)
    assert parse(command.split()).command == command.split()[0]
