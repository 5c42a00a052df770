"""The U-Net that notebook 02 builds is the package's: its definitions are taken from the notebook and run here."""

import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unet_helpers import model as package
from unet_helpers.model import ACTIVATIONS

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_unet_block_by_block.ipynb"
DEFINED = ("make_norm", "DoubleConv", "Down", "Up", "UNet", "center_crop", "pad_to_multiple", "initialise")


@pytest.fixture(scope="module")
def notebook() -> dict:
    """What the cells tagged `same-as-package` define, and nothing else of the notebook."""
    names = {"itertools": itertools, "math": math, "torch": torch, "F": F, "nn": nn, "ACTIVATIONS": ACTIVATIONS}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if "same-as-package" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def test_the_notebook_defines_every_part(notebook):
    assert [name for name in DEFINED if name not in notebook] == []
    assert all(hasattr(package, name) for name in DEFINED)
    for name in DEFINED:
        assert notebook[name] is not getattr(package, name)  # written there, not imported


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("upsampling", ["transpose", "bilinear"])
@pytest.mark.parametrize(("padding", "size"), [("same", (37, 50)), ("valid", (61, 75))])
@pytest.mark.parametrize("activation", ["relu", "pysilu"])
def test_same_initial_weights_same_names_same_output(notebook, padding, size, norm, upsampling, activation):
    settings = {"padding": padding, "norm": norm, "activation": activation, "upsampling": upsampling}
    torch.manual_seed(0)
    ours = notebook["UNet"](3, 2, (4, 6, 8), **settings).apply(notebook["initialise"])
    torch.manual_seed(0)
    theirs = package.UNet(3, 2, (4, 6, 8), **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    image = torch.randn(2, 3, *size)
    assert torch.equal(ours(image), theirs(image))
    assert torch.equal(ours.eval()(image), theirs.eval()(image))


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_same_valid_sizes(notebook, levels):
    with torch.device("meta"):
        ours, theirs = (cls(1, 1, (1,) * levels, "valid") for cls in (notebook["UNet"], package.UNet))
        for size in range(theirs.valid_input_size(1), theirs.valid_input_size(1) + 40):
            assert ours(torch.zeros(1, 1, size, size + 3)).shape == theirs(torch.zeros(1, 1, size, size + 3)).shape


def test_same_defaults(notebook):
    for name in ("DoubleConv", "UNet"):
        theirs = inspect.signature(getattr(package, name)).parameters
        for parameter in inspect.signature(notebook[name]).parameters.values():
            assert parameter.default == theirs[parameter.name].default


def test_same_helpers(notebook):
    x = torch.randn(1, 2, 7, 9)
    for size in itertools.product(range(8), range(10)):
        assert torch.equal(notebook["center_crop"](x, size), package.center_crop(x, size))
    for stride in (1, 2, 4, 8):
        assert torch.equal(notebook["pad_to_multiple"](x, stride), package.pad_to_multiple(x, stride))
