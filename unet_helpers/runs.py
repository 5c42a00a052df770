"""A run lives in a folder: five published files, and `state/` with what resuming needs.

`state/last.safetensors` holds the weights, their average over time, the optimiser and, as JSON in its header, the
progress. It is one file, so that whatever moment training is killed in, it is that of one finished epoch.
"""

import csv
import datetime
import io
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from unet_helpers.config import Config, UserError, dump_config, load_config, one_line, to_dict
from unet_helpers.model import build_model
from unet_helpers.plots import plot_history, to_png
from unet_helpers.system import make_folder, read_tensors, without_nan, write_tensors, write_whole

PUBLISHED = ("config.yaml", "history.csv", "metrics.json", "losses.png", "model.safetensors")
COLUMNS = (
    "epoch", "step", "learning_rate", "train_loss", "val_loss", "val_accuracy", "val_correct", "val_total", "val_dice",
    "val_threshold", "images_per_second", "seconds",
)  # fmt: skip


@dataclass
class Run:
    """A trained network and what belongs to it."""

    path: Path  # its folder
    config: Config  # every setting it was trained with
    model: nn.Module  # the network with its weights, in evaluation mode, on the CPU
    metrics: dict  # the content of `metrics.json`

    @property
    def threshold(self) -> float | None:
        """The probability from which a pixel is foreground, chosen on the validation images; None for classes."""
        return self.metrics["threshold"]


def load_run(path: Path | str) -> Run:
    """Open a run folder; `UserError` if it, or a file in it, is missing, damaged or does not fit the settings."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run folder; `python -m unet_helpers train` makes one.")
    missing = [name for name in ("config.yaml", "metrics.json", "model.safetensors") if not (path / name).is_file()]
    if missing:
        hint = "; its training was interrupted, `train --resume` finishes it" if (path / "state").is_dir() else ""
        raise UserError(f"{path}: this run folder lacks {', '.join(missing)}{hint}.")
    config = load_config(path / "config.yaml")
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        threshold, _ = metrics["threshold"], dict(metrics.get("reads", {}))
        right = type(threshold) in (int, float) and 0 <= threshold <= 1
        if not (right if config.model.num_classes == 1 else threshold is None):
            raise ValueError("its threshold must be between 0 and 1, and null with several classes")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path / 'metrics.json'}: cannot be used, it needs JSON with a threshold: {error}") from error
    return Run(path, config, load_network(path, config), metrics)


def load_network(run: Path, config: Config) -> nn.Module:
    """The network that `config` describes with the weights of a run, in evaluation mode, on the CPU."""
    own = replace(config.model, encoder_weights=None, weights=str(run / "model.safetensors"))
    return build_model(own).eval()


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    best_epoch: int = 0  # the one with the highest validation Dice so far, whose weights are `model.safetensors`
    history: list[dict] = field(default_factory=list)  # a row of `COLUMNS` for the untrained network and each epoch

    def record(self, step: int, rate: float, loss: float | None, speed: float | None, seconds: float, scores: dict):
        """Add a row for the epoch that has just ended, and note whether it is the best."""
        row = {"epoch": self.epoch, "step": step, "learning_rate": rate, "train_loss": loss}
        row |= {f"val_{name}": scores[name] for name in ("loss", "accuracy", "correct", "total", "dice", "threshold")}
        row = without_nan(row | {"images_per_second": speed, "seconds": seconds})
        best = self.history[self.best_epoch]["val_dice"] if self.history else None
        # Where Dice is undefined (nothing to find in the validation images) the latest epoch is taken.
        if best is None or row["val_dice"] is None or row["val_dice"] > best:
            self.best_epoch = self.epoch
        self.history.append(row)

    def line(self, epochs: int) -> str:
        """The last row for human eyes."""
        row = self.history[-1]
        parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  step {row['step']}"]
        parts += [f"loss {row['train_loss']:.4f}"] if row["train_loss"] is not None else ["untrained"]
        parts += [f"validation: loss {row['val_loss']:.4f}"]
        if row["val_accuracy"] is not None:
            parts += [f"accuracy {row['val_accuracy']:.4f} ({row['val_correct']}/{row['val_total']})"]
        parts += [f"Dice {row['val_dice']:.4f}" if row["val_dice"] is not None else "Dice undefined"]
        parts += [f"{row['images_per_second']:.1f} images/s"] if row["images_per_second"] else []
        return "  ".join(parts)


def new_run(run: Path, config: Config, resume: bool) -> None:
    """Make the run folder with its settings, or check the one to `resume`; `UserError` if it cannot be used."""
    last = run / "state" / "last.safetensors"
    if resume:
        if (run / "metrics.json").is_file():
            raise UserError(f"{run}: is finished, there is nothing to resume.")
        if (run / "history.csv").is_file() and not last.is_file():
            raise UserError(f"{run}: cannot be resumed, as {last.relative_to(run)} is gone; start a new run.")
        before = result_settings(load_config(run / "config.yaml"))
        different = [key for key, value in result_settings(config).items() if before[key] != value]
        if different:
            raise UserError(f"{run}: cannot be resumed with another {different[0]}; start a new run for that.")
        return
    taken = [path for path in (*(run / name for name in PUBLISHED), last) if path.exists()]
    if taken:
        raise UserError(f"{run}: already holds a run ({taken[0].name}); choose another folder, or --resume it.")
    make_folder(run / "state")
    write_whole(run / "config.yaml", dump_config(config))


def result_settings(config: Config) -> dict:
    """The settings that decide the result, as {"section.name": value}; where data lies and speed do not."""
    free = {"data.root", "training.workers", "training.device", "training.tensorboard", "training.keep_every_epoch"}
    sections = to_dict(config)
    flat = {"seed": sections.pop("seed")}
    for section, values in sections.items():
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    return {key: value for key, value in flat.items() if key not in free}


def save_epoch(run: Path, config: Config, progress: Progress, network: nn.Module, average, optimiser, scaler) -> None:
    """Write the epoch's weights if they are the best, then the checkpoint: what that claims to exist does exist."""
    best = average.module.state_dict()
    if progress.best_epoch == progress.epoch:
        write_tensors(run / "model.safetensors", best, {"epoch": str(progress.epoch)})
    if config.training.keep_every_epoch:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        write_tensors(run / "state" / f"epoch_{progress.epoch:04d}_{stamp}.safetensors", best)
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
    header = {"progress": json.dumps(asdict(progress)), "scaler": json.dumps(scaler.state_dict() if scaler else {})}
    write_tensors(run / "state" / "last.safetensors", tensors, header)
    write_history(run, progress.history)


def load_state(run: Path, network: nn.Module, average, optimiser, scaler) -> Progress:
    """Put everything back as it was after the last finished epoch; without a checkpoint, begin at the beginning."""
    path = run / "state" / "last.safetensors"
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


def write_history(run: Path, history: list[dict]) -> None:
    """Write `history.csv` and draw `losses.png`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(run / "history.csv", table.getvalue())
    write_whole(run / "losses.png", to_png(plot_history(history, run.name)))


def read_history(path: Path | str) -> list[dict]:
    """Rows of a `history.csv` as dictionaries of numbers, None where a cell is empty."""
    whole = ("epoch", "step", "val_correct", "val_total")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [
            {k: None if row[k] == "" else int(row[k]) if k in whole else float(row[k]) for k in COLUMNS} for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a training history: {error}") from None
