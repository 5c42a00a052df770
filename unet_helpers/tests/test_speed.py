"""`.ci/speed.py`, the developers' comparison of speed, runs and compares like with like."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from unet_helpers.config import Config, DataConfig
from unet_helpers.model import count_parameters

FILE = Path(__file__).parents[2] / ".ci" / "speed.py"


@pytest.fixture
def speed(monkeypatch):
    spec = importlib.util.spec_from_file_location("speed", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speed", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PATCH", 32)
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "DRIVE", (40, 50))
    return module


def test_networks_that_are_compared_have_about_as_many_parameters(speed):
    ours, *others = (count_parameters(make()) for make in speed.NETWORKS.values())
    assert all(0.7 < other / ours < 1.4 for other in others)
    ours, other = (count_parameters(make()) for make in speed.LARGE.values())
    assert 0.8 < other / ours < 1.25


def test_every_part_of_the_comparison_prints_its_figures(speed, monkeypatch, capsys):
    monkeypatch.setattr(speed, "LARGE", {})
    config = Config(data=DataConfig(sample_images=(2, 1, 1), sample_size=64))
    config.augmentation.patch_size = speed.PATCH
    speed.report_steps(config, 1)
    speed.report_switches(1, compiled=False)
    speed.report_prediction(1)
    told = capsys.readouterr().out
    for name in (*speed.NETWORKS, "ours, plain loop", "data", "backward", "ours, flips averaged"):
        assert re.search(rf"^  {re.escape(name)} +\d+\.\d+ s \(\d+\.\d+ to \d+\.\d+\)", told, re.MULTILINE)
    assert re.search(r"^  ours: \d+\.\d+ times the images a second of the plain loop$", told, re.MULTILINE)
    assert "fp32, channels_last, data on host, eager" in told
