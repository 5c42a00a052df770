import ast
import re
import tomllib
from pathlib import Path

import pytest

import unet_helpers

PACKAGE = Path(unet_helpers.__file__).parent
ROOT = PACKAGE.parent
# Bottom first; a module imports only from floors below its own.
FLOORS = [
    ["config"],
    ["system"],
    ["losses", "scores", "images", "sample_data", "augmentation", "plots"],
    ["metrics", "model", "pairing"],
    ["catalogue"],
    ["pretrained", "datasets", "runs"],
    ["prediction", "prepare"],
    ["evaluation"],
    ["training"],
    ["studies"],
    ["__main__"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
UPSTAIRS = {("model", "pretrained")}  # imported inside build_model, and only when it is asked for
TOP_LEVEL = {"notebooks", "unet_helpers", "data", "checkpoints", "predictions", "media"}
TOP_LEVEL |= {"requirements.txt", "README.md", "pyproject.toml"}


def lines_of_modules(package: Path) -> dict[str, int]:
    """How many lines of each module hold something; empty ones make it easier to read."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in package.glob("*.py")}
    return {name: sum(bool(line.strip()) for line in text.splitlines()) for name, text in texts.items()}


def imports_of(source: str) -> dict[str, int]:
    """Modules of the package that a source text imports, at any depth, with the indentation of the first time."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if base == "unet_helpers" or (node.level and not base):
                names = [alias.name for alias in node.names]
            elif base.startswith("unet_helpers.") or node.level:
                names = [base.removeprefix("unet_helpers.")]
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix("unet_helpers.") for alias in node.names if "unet_helpers." in alias.name]
        for name in names:
            found.setdefault(name.split(".")[0], node.col_offset)
    return found


def wrong_imports(sources: dict[str, str]) -> list[tuple[str, str]]:
    """(module, imported module) for every import that does not go down."""
    return [
        (name, other)
        for name, source in sources.items()
        for other, indentation in imports_of(source).items()
        if FLOOR_OF[other] >= FLOOR_OF[name] and not ((name, other) in UPSTAIRS and indentation)
    ]


def test_the_package_is_small():
    lines = lines_of_modules(PACKAGE)
    assert len([name for name in lines if not name.startswith("__")]) <= 20
    assert sum(lines.values()) <= 4000
    assert {name: count for name, count in lines.items() if count > 280} == {}


def test_every_module_stands_on_one_floor():
    assert sorted(name for names in FLOORS for name in names) == sorted(lines_of_modules(PACKAGE).keys() - {"__init__"})


def test_a_module_imports_only_from_floors_below_its_own():
    sources = {name: (PACKAGE / f"{name}.py").read_text(encoding="utf-8") for name in FLOOR_OF}
    assert wrong_imports(sources) == []
    assert all("pretrained" in imports_of(sources[name]) for name, _ in UPSTAIRS)  # no exception without need


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("scores", "from unet_helpers.metrics import level", ["metrics"]),
        ("scores", "def f():\n    import unet_helpers.training", ["training"]),
        ("metrics", "from unet_helpers import model, scores", ["model"]),
        ("datasets", "from .runs import load_run", ["runs"]),
        ("datasets", "from . import evaluation", ["evaluation"]),
        ("model", "from unet_helpers.pretrained import PretrainedNet", ["pretrained"]),
        ("model", "def f():\n    from unet_helpers.pretrained import PretrainedNet", []),
        ("training", "import torch\nfrom unet_helpers.config import Config", []),
    ],
)
def test_imports_upstairs_are_seen(module, source, wrong):
    assert wrong_imports({module: source}) == [(module, other) for other in wrong]


def test_nothing_else_is_visible_at_the_top():
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert visible - {"unet_helpers.egg-info"} - TOP_LEVEL == set()


def test_dependencies_stand_once():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not settings["project"].keys() & {"dependencies", "optional-dependencies", "dynamic"}
    assert "dependency-groups" not in settings


def loose_requirements(text: str) -> list[str]:
    """Lines of a requirements file that are no range `name>=low,<high`, the last one aside."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines[:-1] if not re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=[\d.]+,<[\d.]+", line)]


def test_requirements_are_ranges_and_end_with_the_package_itself():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert text.rstrip().splitlines()[-1] == "-e ."
    assert loose_requirements(text) == []


@pytest.mark.parametrize("line", ["torch", "torch==2.6", "torch>=2.6", "torch<3", "torch>=2.6,<=3", "-e .", "git+x"])
def test_a_loose_requirement_is_seen(line):
    assert loose_requirements(f"# comment\n{line}\nnumpy>=1.26,<3\n-e .\n") == [line]
