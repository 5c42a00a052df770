"""A run lives in a folder: five published files, and `state/last.safetensors`, with weights, average, optimiser and
progress in one file, so that whatever moment training is killed in, they are of one finished epoch.
"""

import csv
import json
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from unet_helpers import catalogue, plots
from unet_helpers.config import SECTIONS, Config, RunError, UserError, dump_config, load_config, one_line, to_dict
from unet_helpers.model import Ensemble, build_model
from unet_helpers.system import make_folder, read_tensors, without_nan, write_table, write_tensors, write_whole

LAST = Path("state") / "last.safetensors"
PUBLISHED = ("config.yaml", "history.csv", "metrics.json", "losses.png", "model.safetensors")
VALIDATED = tuple(f"val_{name}" for name in ("loss", "accuracy", "correct", "total", "dice", "threshold"))
COLUMNS = ("epoch", "step", "learning_rate", "train_loss", *VALIDATED, "images_per_second", "seconds")


@dataclass
class Run:
    """A trained network, or an ensemble of them, and what belongs to it."""

    path: Path  # its folder
    config: Config  # every setting it was trained with; of an ensemble, its first run's, but for flips and rotation
    model: nn.Module  # in evaluation mode, on the CPU; its `view_diameter`: that of training images, in pixels, or None
    metrics: dict  # the content of `metrics.json`; of an ensemble also "runs", their names, and "thresholds"

    @property
    def threshold(self) -> float | None:
        """The probability from which a pixel is foreground, chosen on the validation images; None for classes."""
        return self.metrics["threshold"]


def load_run(path: Path | str) -> Run:
    """Open a run folder, or a folder of them: an ensemble, which averages probabilities, and whose threshold is the
    mean of its runs' until `evaluate` has chosen one. Raises `UserError` if it, or a file in it, is missing, damaged or
    does not fit the settings, and if the runs of an ensemble do not go together.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run folder; `python -m unet_helpers train` makes one.")
    members = sorted(file.parent for file in path.glob("*/config.yaml"))
    if members and not (path / "config.yaml").is_file():
        return join_runs(path, [load_run(member) for member in members])
    needed = ("config.yaml", "metrics.json", "model.safetensors")
    if missing := [name for name in needed if not (path / name).is_file()]:
        hint = "; its training was interrupted, `train --resume` finishes it" if (path / "state").is_dir() else ""
        raise UserError(f"{path}: this run folder lacks {', '.join(missing)}{hint}.")
    config = load_config(path / "config.yaml")
    metrics, model = read_metrics(path, config), load_network(path, config)
    model.view_diameter = metrics.get("view_diameter")
    return Run(path, config, model, metrics)


def read_metrics(path: Path, config: Config) -> dict:
    """The content of `metrics.json`; `UserError` if it cannot be used."""
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        threshold, size = metrics["threshold"], metrics.get("view_diameter") or 1
        _, _ = dict(metrics.get("reads", {})), "".join(metrics.get("training_images", []))  # of the right types?
        right = type(threshold) in (int, float) and 0 <= threshold <= 1
        right = right if config.model.num_classes == 1 else threshold is None
        if not right or type(size) not in (int, float) or not 0 < size < 1e6:
            raise ValueError("its threshold must be between 0 and 1, null with several classes, view_diameter a number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / 'metrics.json'}: cannot be used, it needs JSON with a threshold: {error}") from error
    return metrics


def join_runs(path: Path, runs: list[Run]) -> Run:
    """The ensemble of runs that name and see things alike, with the mirror images and turns that all have seen."""
    names, configs = [run.path.name for run in runs], [run.config for run in runs]
    sizes = [run.model.view_diameter or 0 for run in runs]
    what = "model.num_classes data.name data.labels data.palette data.normalisation data.longest_side"
    alike = {tuple(str(result_settings(config)[name]) for name in what.split()) for config in configs}
    if len(alike) > 1 or max(sizes) > 1.1 * min(sizes):
        raise UserError(f"{path}: its runs are no ensemble, which needs equal {what} and view_diameter; name one.")
    flips = min((config.augmentation.flips for config in configs), key=[False, "horizontal", True].index)
    rotation = min(config.augmentation.rotation for config in configs)
    config = replace(configs[0], augmentation=replace(configs[0].augmentation, flips=flips, rotation=rotation))
    known = {"runs": names, "thresholds": [run.threshold for run in runs]}
    metrics = {"threshold": None if runs[0].threshold is None else statistics.mean(known["thresholds"])}
    own = read_metrics(path, config) if (path / "metrics.json").is_file() else {}  # if of other runs, reads count
    metrics = own if known.items() <= own.items() else metrics | {"reads": own.get("reads", {})}
    seen = sorted({name for run in runs for name in run.metrics.get("training_images", [])})
    model = Ensemble([run.model for run in runs]).eval()
    model.view_diameter = statistics.mean(sizes) or None
    return Run(path, config, model, metrics | known | {"training_images": seen})


def export(run: Path | str, output: Path | str) -> None:
    """Write a run as ONNX: `image`, float32 (B, 3, H, W) of any size, normalised, to `probability`, (B, 1 or K, H, W).

    Its metadata hold, as JSON, `threshold`, `classes`, `normalisation` and `longest_side` (for `images.normalise` and
    `shrink`) and `view_diameter`. Raises `UserError` for valid padding, or if run or output cannot be used.
    """
    opened, output = load_run(run), Path(output)
    data, num_classes = opened.config.data, opened.config.model.num_classes
    if any(getattr(part, "border", 0) for part in opened.model.modules()):
        raise UserError(f"{run}: has model.padding valid, whose mirrored border ONNX lacks: export one with same.")
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 9):
        raise UserError(f"torch {torch.__version__} cannot export images of any size: update it to 2.9 or newer.")
    make_folder(output.parent)
    network = nn.Sequential(opened.model, nn.Sigmoid() if num_classes == 1 else nn.Softmax(1)).eval()
    names = {"input_names": ["image"], "output_names": ["probability"]}
    sizes, image = ({0: "batch", 2: "height", 3: "width"},), torch.randn(2, 3, 75, 101)
    proto = torch.onnx.export(network, (image,), dynamo=True, dynamic_shapes=sizes, verbose=False, **names).model_proto
    known = {"threshold": opened.threshold, "classes": catalogue.class_names(data, num_classes)}
    known |= {"normalisation": data.normalisation, "longest_side": data.longest_side}
    known |= {"view_diameter": opened.model.view_diameter}
    for key, value in known.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    write_whole(output, proto.SerializeToString())


def load_network(run: Path, config: Config) -> nn.Module:
    """The network that `config` describes with the weights of a run, in evaluation mode, on the CPU."""
    return build_model(replace(config.model, encoder_weights=None, weights=str(run / "model.safetensors"))).eval()


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    best_epoch: int = 0  # the one with the highest validation Dice so far, whose weights are `model.safetensors`
    images: list[list[str]] = field(default_factory=list)  # names of those trained on, and of those that validate
    history: list[dict] = field(default_factory=list)  # a row of `COLUMNS` for the untrained network and each epoch

    def record(self, step: int, rate: float, loss: float | None, speed: float | None, seconds: float, scores: dict):
        """Add a row for the epoch that has just ended, and note whether it is the best."""
        row = {"epoch": self.epoch, "step": step, "learning_rate": rate, "train_loss": loss}
        row |= {name: scores[name.removeprefix("val_")] for name in VALIDATED}
        row = without_nan(row | {"images_per_second": speed, "seconds": seconds})
        best = self.history[self.best_epoch]["val_dice"] if self.history else None
        # Where Dice is undefined or 0 (nothing to find in the validation images) the latest epoch is taken.
        if not best or row["val_dice"] is None or row["val_dice"] > best:
            self.best_epoch = self.epoch
        self.history.append(row)

    def line(self, epochs: int) -> str:
        """The last row for human eyes."""
        row = self.history[-1]
        loss = "untrained" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        accuracy = f"accuracy {row['val_accuracy']:.4f} ({row['val_correct']}/{row['val_total']})"
        dice = "Dice undefined" if row["val_dice"] is None else f"Dice {row['val_dice']:.4f}"
        speed = f"  {row['images_per_second']:.1f} images/s" if row["images_per_second"] else ""
        start = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  step {row['step']}"
        return f"{start}  {loss}  validation: loss {row['val_loss']:.4f}  {accuracy}  {dice}{speed}"


def new_run(run: Path, config: Config, resume: bool) -> None:
    """Make the run folder with its settings, or check the one to `resume`; `UserError` if it cannot be used."""
    last = run / LAST
    if resume:
        if (run / "metrics.json").is_file():
            raise UserError(f"{run}: is finished, there is nothing to resume.")
        if (run / "history.csv").is_file() and not last.is_file():
            raise UserError(f"{run}: cannot be resumed, as {LAST} is gone; start a new run.")
        before = result_settings(load_config(run / "config.yaml"))
        if different := [key for key, value in result_settings(config).items() if before[key] != value]:
            raise UserError(f"{run}: cannot be resumed with another {different[0]}; start a new run for that.")
    elif taken := [path for path in (*(run / name for name in PUBLISHED), last) if path.exists()]:
        raise UserError(f"{run}: already holds a run ({taken[0].name}); choose another folder, or --resume it.")
    make_folder(run / "state")
    if not resume:
        write_whole(run / "config.yaml", dump_config(config))


def result_settings(config: Config) -> dict:
    """The settings that decide the result, as {"section.name": value}; where data lies and speed do not."""
    free = {"data.root", "training.workers", "training.device", "training.tensorboard", "training.keep_every_epoch"}
    sections = to_dict(config)
    flat = {f"{section}.{name}": value for section in SECTIONS for name, value in sections[section].items()}
    for name in ("model.weights", "model.encoder_weights"):  # files by their last folder: a study may be moved
        flat[name] = flat[name] and "/".join(Path(flat[name]).parts[-2:])
    return {"seed": config.seed} | {key: value for key, value in flat.items() if key not in free}


def save_epoch(run: Path, config: Config, progress: Progress, network: nn.Module, average, optimiser, scaler) -> None:
    """Write the epoch's weights if they are the best, then the checkpoint: what that claims to exist does exist."""
    if (run / "metrics.json").exists():
        raise RunError(f"{run}: has been finished by another process, so this one ends; its files stay as they are.")
    best = average.module.state_dict()
    if progress.best_epoch == progress.epoch:
        write_tensors(run / "model.safetensors", best, {"epoch": str(progress.epoch)})
    if config.training.keep_every_epoch:
        write_tensors(run / "state" / f"epoch_{progress.epoch:04d}_{time.strftime('%Y%m%d-%H%M%S')}.safetensors", best)
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
    header = {"progress": json.dumps(asdict(progress)), "scaler": json.dumps(scaler.state_dict() if scaler else {})}
    write_tensors(run / LAST, tensors, header)
    with suppress(UserError):  # a spreadsheet holds the file, on Windows: the checkpoint has it all
        write_history(run, progress.history, draw=progress.history[-1]["seconds"] > 3)


def load_state(run: Path, network: nn.Module, average, optimiser, scaler) -> Progress:
    """Put everything back as it was after the last finished epoch; without a checkpoint, begin at the beginning."""
    path = run / LAST
    if not path.is_file():
        return Progress()  # interrupted before the first checkpoint
    tensors, header = read_tensors(path)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        network.load_state_dict(part("network."))
        average.load_state_dict(part("average."))
        states: dict[int, dict] = {}
        for key, value in part("optimiser.").items():
            index, name = key.split(".", 1)
            states.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
        if scaler and (saved := json.loads(header["scaler"])):  # empty after training without one
            scaler.load_state_dict(saved)
        for weight, state in optimiser.state.items():
            shapes = {name: value.shape for name, value in state.items()}
            if shapes != {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                raise ValueError("its optimiser is another one")
        progress = Progress(**json.loads(header["progress"]))
        if progress.best_epoch not in range(1 + progress.epoch) or 1 + progress.epoch != len(progress.history):
            raise ValueError("its progress makes no sense")
        return progress
    except (RuntimeError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: does not fit this run's settings ({one_line(error)}); start a new run.") from error


def write_history(run: Path, history: list[dict], draw: bool = True) -> None:
    """Write `history.csv` and draw `losses.png`, in training not after epochs so short that drawing would slow it."""
    write_table(run / "history.csv", COLUMNS, history)
    if draw:
        write_whole(run / "losses.png", plots.to_png(plots.plot_history(history, run.name)))


def read_history(path: Path | str) -> list[dict]:
    """Rows of a `history.csv` as dictionaries of numbers, None where a cell is empty."""
    kinds = dict.fromkeys(COLUMNS, float) | dict.fromkeys(("epoch", "step", "val_correct", "val_total"), int)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [{name: None if row[name] == "" else kind(row[name]) for name, kind in kinds.items()} for row in rows]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a training history: {one_line(error)}") from None
