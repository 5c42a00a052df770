"""What settings bring, and what they cost: studies of several runs an arm, and the speed of one.

A study is a folder whose `grid.yaml` names arms, each some settings and a number of seeds. `run_study` trains what is
missing and adds a row a run to `rows.csv`; `summarise_study` turns the rows into a table with intervals.
"""

import csv
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch.utils.data import DataLoader

from unet_helpers import system
from unet_helpers.config import SECTIONS, Config, UserError, check_config, from_dict, load_config, one_line, read_yaml
from unet_helpers.datasets import TrainingPatches, WholeImages, decode, draw_once, settle
from unet_helpers.evaluation import samples_of, score_images
from unet_helpers.losses import SegmentationLoss
from unet_helpers.metrics import mean_dice
from unet_helpers.model import build_model, count_parameters
from unet_helpers.plots import plot_arms, to_png
from unet_helpers.prediction import predict, predict_probabilities
from unet_helpers.runs import load_run, new_run, read_history, result_settings
from unet_helpers.sample_data import make_retina
from unet_helpers.scores import Score, bootstrap_interval, dice, paired_difference, widened
from unet_helpers.training import make_accelerator, shared_batches, train, train_step

ENOUGH_SEEDS = 5  # with fewer, nothing is called better
SOME_IMAGES = 20  # of the training images are scored, too: how much of what was trained on has been learned by heart?
# Columns of `rows.csv`, in JSON but for texts: Dice and losses after each epoch; validation images' counts by name.
TEXT, CURVES = ("arm", "device"), ("val_dice", "train_loss", "val_loss")
NUMBERS = ("val_dice", "train_dice", "best_epoch", "parameters", "seconds")
COLUMNS = ("arm", "seed", "settings", *NUMBERS, "device", *(f"{name}_curve" for name in CURVES), "counts")
FOUND = ("mean", "deviation", "low", "high", "difference", "difference_low", "difference_high")  # by `summarise_study`


@dataclass(frozen=True)
class Arm:
    """One choice that a study compares with others."""

    name: str
    config: Config
    seeds: list[int]  # it is trained with each of them
    starts_from: str | None  # the arm, with the same seed, whose weights its network (of smp: its encoder) starts from


def load_grid(study: Path | str) -> tuple[dict[str, Arm], str]:
    """The arms of a study by name, and which one the others are compared with; `UserError` if `grid.yaml` is wrong.

    It holds `baseline: NAME`, `base:` with settings as in a run's `config.yaml`, and `arms:`, a mapping from names to
    `seeds: 5` (or a list), what differs from the base (`model.activation: gelu`) and perhaps `starts_from: ARM`.
    """
    path = Path(study) / "grid.yaml"
    grid, arms = read_yaml(path), {}
    try:
        if odd := set(grid) - {"baseline", "base", "arms"} | set(grid.get("base", {})) - set(SECTIONS):
            raise ValueError(f"{min(odd, key=str)} is none of baseline, base (with {', '.join(SECTIONS)}) and arms")
        for name, changes in grid["arms"].items():
            settings = {section: dict(grid.get("base", {}).get(section, {})) for section in SECTIONS}
            changes = dict(changes)
            seeds, starts_from = changes.pop("seeds"), changes.pop("starts_from", None)
            seeds = list(range(seeds)) if type(seeds) is int else seeds
            starts_from = None if starts_from is None else str(starts_from)
            if {"/", "\\"} & set(str(name)):
                raise ValueError(f"arm {name}: its name is that of a folder, so no / or \\ can be in it")
            if not seeds or any(type(seed) is not int for seed in seeds) or (starts_from and starts_from not in arms):
                raise ValueError(f"arm {name} needs a number of seeds, and to start from an arm above it, if any")
            for key, value in changes.items():
                section, _, setting = key.partition(".")
                settings[section][setting] = value
            arms[str(name)] = Arm(str(name), from_dict(settings, f"arm {name}"), seeds, starts_from)
        if (baseline := str(grid["baseline"])) not in arms:
            raise ValueError(f"the baseline {baseline} is no arm")
        return arms, baseline
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}, or names a section of settings that does not exist.") from None
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: is no grid of arms: {one_line(error)}") from error


def settings_of(arms: dict[str, Arm], arm: Arm, seed: int) -> dict:
    """What decides a run's result, as its row remembers it; where the grid asks for something else, it is made anew."""
    origin = {"starts_from": settings_of(arms, arms[arm.starts_from], seed)} if arm.starts_from else {}
    return result_settings(replace(arm.config, seed=seed)) | origin


def complete(settings: dict) -> dict:
    """The same with a default for each setting that did not exist yet when the row was written."""
    origin = {"starts_from": complete(settings["starts_from"])} if "starts_from" in settings else {}
    return result_settings(Config()) | settings | origin


def run_study(study: Path | str, only: list[str] | None = None, quiet: bool = False) -> list[dict]:
    """Train every run of the grid (of the arms `only`) that has no row yet; return all rows that belong to the grid.

    Interrupted runs go on; an arm whose encoder weights cannot be loaded is left out, and said so. Rows are written as
    runs finish, a picture, `arms.png`, at the end. `UserError` for a damaged grid or row, or another run in the way.
    """
    study = Path(study)
    arms, baseline = load_grid(study)
    if unknown := set(only or []) - set(arms):
        raise UserError(f"{study / 'grid.yaml'}: has no arm {min(unknown)}, but {', '.join(arms)}.")
    rows = read_rows(study, arms)
    for arm in arms.values():
        for seed in arm.seeds if not only or arm.name in only else []:
            if not any((row["arm"], row["seed"]) == (arm.name, seed) for row in rows):
                try:
                    run = make_run(study, arms, arm, seed, quiet)
                except UserError as error:
                    origins = [arm]
                    while origins[-1].starts_from:
                        origins.append(arms[origins[-1].starts_from])
                    if all(origin.config.model.encoder_weights is None for origin in origins):
                        raise
                    print(f"{arm.name}: not run here: {error}")
                    break
                row = score_arm(run) | {"arm": arm.name, "seed": seed, "settings": settings_of(arms, arm, seed)}
                # Read again: another process may train other arms. Rows of other grids stay, though they do not count.
                kept = [one for one in read_rows(study) if any(one[k] != row[k] for k in ("arm", "seed", "settings"))]
                write_rows(study, sorted([*kept, row], key=lambda r: ([*arms, r["arm"]].index(r["arm"]), r["seed"])))
                rows = read_rows(study, arms)
    system.write_whole(study / "arms.png", to_png(plot_arms(summarise_study(rows, arms, baseline), baseline)))
    return rows


def make_run(study: Path, arms: dict[str, Arm], arm: Arm, seed: int, quiet: bool) -> Path:
    """The folder of a finished run, trained now if need be, after that which it starts from."""
    run = study / "runs" / f"{arm.name}-{seed}"
    kept = run / "config.yaml"
    config = replace(arm.config, seed=seed, data=settle(arm.config.data))
    if arm.starts_from:
        origin = make_run(study, arms, arms[arm.starts_from], seed, quiet).resolve() / "model.safetensors"
        part = "weights" if arm.config.model.architecture == "unet" else "encoder_weights"
        config = replace(config, model=replace(config.model, **{part: str(origin)}))
        if kept.is_file() and kept.stat().st_mtime < origin.stat().st_mtime:
            raise UserError(f"{run}: has begun from other weights than {origin} holds now; delete that folder.")
    if kept.is_file() and result_settings(load_config(kept)) != result_settings(config):
        raise UserError(f"{run}: holds a run of other settings than grid.yaml asks for; delete that folder.")
    if not (run / "metrics.json").is_file():
        train(config, run, resume=kept.is_file(), quiet=quiet)
    return run


def score_arm(run: Path) -> dict:
    """What a row says about a finished run."""
    opened, history, device, dices = load_run(run), read_history(run / "history.csv"), system.find_device(), {}
    network, classes = opened.model.to(device), opened.config.model.num_classes
    for split in ("train", "val"):
        names = opened.metrics["training_images"][:SOME_IMAGES]
        samples = [one for one in samples_of(opened.config, split) if split == "val" or one.name in names]
        counted = score_images(network, WholeImages(samples, opened.config), classes, device, opened.threshold)
        counts = np.stack(list(counted.by_group().values()))
        dices[f"{split}_dice"] = float(score_of(counts)(counts.sum(0)))
    curves = {f"{name}_curve": [row[name] for row in history] for name in CURVES}
    known = {name: opened.metrics[name] for name in ("best_epoch", "parameters", "seconds", "device")}
    return dices | known | curves | {"counts": dict(zip(counted.by_group(), counts.tolist(), strict=True))}


def score_of(counts: np.ndarray) -> Score:
    """Dice of counts (..., 4), or its mean over the classes of counts (..., N, K, 4)."""
    return dice if counts.ndim == 2 else mean_dice


def read_rows(study: Path, arms: dict[str, Arm] | None = None) -> list[dict]:
    """The rows of `rows.csv`, or those that belong to these arms as they are now; `UserError` if it is damaged."""
    path = Path(study) / "rows.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        rows = [{k: v if k in TEXT else json.loads(v) for k, v in row.items() if k in COLUMNS} for row in rows]
        if arms is None:
            return rows
        known = [row for row in rows if row["arm"] in arms]
        wanted = [settings_of(arms, arms[row["arm"]], row["seed"]) for row in known]
        known = [row for row, now in zip(known, wanted, strict=True) if complete(row["settings"]) == now]
        for arm in {row["arm"] for row in known}:
            own = [row for row in known if row["arm"] == arm]
            counts, sound = counts_of(own), not any(row["val_dice"] < 0 or row["val_dice"] > 1 for row in own)
            kinds, true = (counts.dtype.kind, counts.shape[-1]), counts[..., ::2].sum(-1)  # tp + fn: true pixels
            if not sound or kinds != ("i", 4) or np.ptp(true, axis=0).any():
                raise ValueError(f"{arm}: wrong Dice or counts, or its seeds saw other masks: delete its rows and runs")
        return known
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as rows of a study: {one_line(error)}") from error


def write_rows(study: Path, rows: list[dict]) -> None:
    """Write `rows.csv`, whole or not at all."""
    cells = [{k: v if k in TEXT else json.dumps(v) for k, v in row.items()} for row in rows]
    system.write_table(study / "rows.csv", COLUMNS, cells)


def summarise_study(rows: list[dict], arms: dict[str, Arm], baseline: str) -> list[dict]:
    """A dictionary for each arm: `arm`, `seeds`, the `dices` of its seeds, their `mean`, `deviation` and interval `low`
    to `high`; `difference`, `difference_low`, `difference_high` to the baseline, and `verdict`.

    All are validation Dice. Intervals are bootstrapped over seeds and groups (the views of one car, say), and `widened`
    as so few ask for; differences are between runs of one seed on the same images. The verdict is `better` or `worse`
    where it excludes zero and there are `ENOUGH_SEEDS`, not corrected for several arms. NaN: it was not run.
    """
    table, base = [], {row["seed"]: row for row in rows if row["arm"] == baseline}
    for name in arms:
        own = {row["seed"]: row for row in rows if row["arm"] == name}
        dices = [row["val_dice"] for row in own.values()]
        entry = {"arm": name, "seeds": len(own), "dices": dices, "verdict": ""} | dict.fromkeys(FOUND, math.nan)
        if own:
            entry["mean"] = statistics.mean(dices)
        if len(own) > 1:
            counts = counts_of(own.values())
            interval = bootstrap_interval(counts, score_of(counts[0]))
            entry["deviation"] = float(np.std(dices, ddof=1))
            entry["low"], entry["high"] = widened(entry["mean"], *interval, len(own))
        common = sorted(own.keys() & base.keys()) if name != baseline else []
        same = all(own[seed]["counts"].keys() == base[seed]["counts"].keys() for seed in common)
        a, b = (counts_of([side[seed] for seed in common]) for side in (own, base))
        if len(common) > 1 and same and np.array_equal(a[..., ::2].sum(-1), b[..., ::2].sum(-1)):  # of the same masks
            found = paired_difference(a, b, score_of(a[0]))
            entry |= {name: found[name.removeprefix("difference_")] for name in FOUND[-3:]}
            if len(common) >= ENOUGH_SEEDS:
                entry["verdict"] = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else ""
        table.append(entry)
    return table


def counts_of(rows) -> np.ndarray:
    """Counts of runs and their groups of images, (S, N, 4) or (S, N, K, 4)."""
    return np.array([[counts for _, counts in sorted(row["counts"].items())] for row in rows])


def format_study(table: list[dict]) -> str:
    """The table of `summarise_study` as text."""
    width = max(len(entry["arm"]) for entry in table)
    lines = [f"{'arm':{width}}  seeds   Dice     sd      95% interval     to baseline    95% interval"]
    for entry in table:
        line = f"{entry['arm']:{width}}  {entry['seeds']:5}  "
        if not entry["seeds"]:
            lines.append(line + "not run here")
            continue
        line += f"{entry['mean']:.4f}  {entry['deviation']:.4f}  {entry['low']:.4f} to {entry['high']:.4f}"
        if not math.isnan(entry["difference"]):
            interval = f"{entry['difference_low']:+.4f} to {entry['difference_high']:+.4f}"
            line += f"  {entry['difference']:+.4f}      {interval}  {entry['verdict']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def benchmark(config: Config, size: tuple[int, int] = (584, 565), steps: int = 12, warmup: int = 3) -> dict:
    """Measure training and prediction with the configured model, data and device.

    Each is done `warmup` times unmeasured (to choose kernels and fill caches), then `steps` times; the image predicted
    has `size` (height, width), by default DRIVE's. Returns the `spread` of images trained on per second and of the
    seconds of a training step, waiting for its data (`data_share` of it), reading an image (`decode`) or taking it from
    memory or cache (`cached`), and predicting one without and with flips.
    """
    check_config(config)
    accelerator, settings = make_accelerator(config), config.training
    device = accelerator.device
    patches = TrainingPatches(samples_of(config, "train"), config)
    torch.manual_seed(config.seed)
    network = build_model(config.model).to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, fused=device.type != "mps")
    model, optimiser = accelerator.prepare(network, optimiser)
    loss_function = SegmentationLoss(config.model.num_classes, settings.dice_weight, settings.class_weights)
    batches = shared_batches(0, warmup + steps, settings.batch_size, 0, 1)
    moments = [system.clock(device)]
    for images, masks in DataLoader(patches, batch_sampler=batches, num_workers=settings.workers):
        moments.append(system.clock(device))
        train_step(model, optimiser, loss_function, accelerator, images, masks, settings.clip_norm)
        moments.append(system.clock(device))
    waits = np.diff(moments)[::2][warmup:]  # for data, then follows the step
    totals = np.diff(moments[::2])[warmup:]

    plain = build_model(config.model).to(device).eval()
    image = torch.randn(3, *size, device=device)
    samples, turns = cycle(patches.decoded.samples), cycle(range(len(patches.decoded)))
    timed = partial(system.measure, device=device, steps=steps, warmup=warmup)
    result = {"device": system.describe_device(device), "precision": accelerator.mixed_precision}
    result |= {"parameters": count_parameters(plain), "batch_size": settings.batch_size, "image_size": list(size)}
    result["patch_size"] = config.augmentation.patch_size
    result |= {"training_step_seconds": system.spread(totals), "data_seconds": system.spread(waits)}
    result["data_share"] = float(waits.sum() / totals.sum())
    result |= {"images_per_second": system.spread(settings.batch_size / totals)}
    result["decode_seconds"] = timed(lambda: draw_once.cache_clear() or decode(next(samples), config))
    result["cached_seconds"] = timed(lambda: [np.array(part) for part in patches.decoded[next(turns)]])
    result["cache_saves_seconds"] = result["decode_seconds"]["median"] - result["cached_seconds"]["median"]  # an image
    result["predict_seconds"] = timed(lambda: predict_probabilities(plain, image, False))
    result["predict_flips_seconds"] = timed(lambda: predict_probabilities(plain, image))
    return result | {"peak_memory_gib": system.peak_memory(device)}


def measure_large(config: Config, side: int = 8000) -> dict[str, float]:
    """Seconds, files included, that predicting a tiled TIFF of `side` × `side` pixels with flips takes on the CPU, and
    GiB above what this process has ever used before (Linux only), with a new network.
    """
    with tempfile.TemporaryDirectory() as folder:
        run, tiles = Path(folder), [make_retina(0, 256).image] * math.ceil(side / 256) ** 2
        new_run(run, config, resume=False)
        system.write_json(run / "metrics.json", {"threshold": 0.5 if config.model.num_classes == 1 else None})
        system.write_tensors(run / "model.safetensors", build_model(config.model).state_dict())
        options = {"dtype": np.uint8, "tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
        tifffile.imwrite(run / "in.tif", iter(tiles), shape=(side, side, 3), **options)
        before, started = system.peak_memory(), time.perf_counter()
        predict(run, [run / "in.tif"], run / "out", device="cpu", quiet=True)
        return {"large_seconds": time.perf_counter() - started, "large_memory_gib": system.peak_memory() - before}
