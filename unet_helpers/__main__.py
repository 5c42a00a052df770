"""The command line: `python -m unet_helpers prepare|train|evaluate|predict|export|benchmark|study`.

Every setting of a run is a flag, called as in `config.yaml`: `--training.epochs 20`. A YAML file given with `--config`
is read first, and flags win. Exit codes: 0; 1 failed while running; 2 wrong input or settings; 130 interrupted.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import get_args, get_type_hints

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # no traceback from the seconds in which torch is imported

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from unet_helpers.config import SECTIONS, Config, DataConfig, RunError, UserError, explain, from_parsed, load_config
from unet_helpers.system import memory_is_full, without_nan

DATA_SETS = get_args(get_type_hints(DataConfig)["name"])


class Parser(ArgumentParser):
    """A parser that complains in one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Say what is wrong, without usage and tips around it."""
        raise UserError(f"{explain(message)} (see `{self.prog.replace(' [options]', '')} --help`)") from ex


def prepare_command(args: Namespace) -> None:
    """Check a data set, fetch it where that is possible, and list its images by split.

    Writes OUTPUT/NAME_{train,val,test}.csv with the columns image, mask, field_of_view, group and split.
    """
    from unet_helpers.prepare import expand_offline, prepare

    data = DataConfig(name=args.name, root=args.data_root, **args.data.as_dict())
    print(prepare(data, Path(args.output), download=not args.no_download))
    if args.offline:
        print(expand_offline(data, Path(args.offline)))


def train_command(args: Namespace) -> None:
    """Train a network. Without arguments: a small one, on built-in sample data, in about two minutes on two CPU cores.

    On several GPUs or machines: `torchrun --nproc-per-node 4 -m unet_helpers train ...`.
    """
    from unet_helpers.training import train

    config = from_parsed(args.as_dict())
    run = args.resume or args.run or f"checkpoints/{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}"
    metrics = train(config, run, resume=bool(args.resume))
    if metrics:  # on the main process
        threshold = "" if metrics["threshold"] is None else f", threshold {metrics['threshold']}"
        print(f"Validation Dice {metrics['val']['dice']:.4f} (epoch {metrics['best_epoch']}{threshold}), in {run}.")


def evaluate_command(args: Namespace) -> None:
    """Score a run: all pixels of a split pooled, at native size, with the threshold chosen on validation images."""
    from unet_helpers.evaluation import compare, evaluate
    from unet_helpers.runs import load_run

    data = load_run(args.run).config.data
    data = replace(data, name=args.data or data.name, root=args.data_root or data.root)
    options = {"data": data, "split": args.split, "device": args.device, **averaging(args)}
    compared = {"compared": compare(args.run, args.compare, **options)} if args.compare else {}
    report(evaluate(args.run, save=args.save, **options) | compared, args.json)


def predict_command(args: Namespace) -> None:
    """Predict images: STEM_mask.png and STEM_probability.png (16 bit), at their own size; over 2^25 pixels .tif."""
    from unet_helpers.prediction import predict

    output = Path(args.output or Path("predictions") / Path(args.run).resolve().name)
    options = {"truth": args.truth, "gif": args.gif, "max_pixels": args.max_pixels, **averaging(args)}
    masks = predict(args.run, args.paths, output, device=args.device, **options)
    print(f"{len(masks)} predicted, written to {output}.")


def averaging(args: Namespace) -> dict:
    """What `predict` and `evaluate` have in common."""
    return {"flips": "rotations" if args.rotations else not args.no_flips, "min_size": args.min_size}


def export_command(args: Namespace) -> None:
    """Write a run as ONNX, for images of any size, with its threshold, classes and normalisation as metadata."""
    from unet_helpers.runs import export

    output = args.output or f"{Path(args.run).resolve().name}.onnx"
    export(args.run, output)
    print(f"Written to {output}.")


def benchmark_command(args: Namespace) -> None:
    """Measure speed and memory of training and prediction: medians and quartiles."""
    from unet_helpers.studies import benchmark, measure_large

    config = from_parsed(args.as_dict())
    large = measure_large(config) if args.large else {}
    report(benchmark(config, tuple(args.size), args.steps) | large, args.json)


def study_command(args: Namespace) -> None:
    """Train what a study's grid.yaml asks for and rows.csv lacks, and print the table of its arms."""
    from unet_helpers.studies import format_study, load_grid, run_study, summarise_study

    print(format_study(summarise_study(run_study(args.study, args.arms), *load_grid(args.study))))


COMMANDS = (prepare_command, train_command, evaluate_command, predict_command, export_command, benchmark_command)
COMMANDS = {command.__name__.removesuffix("_command"): command for command in (*COMMANDS, study_command)}


def make_parsers() -> dict[str, Parser]:
    """The parser of each command."""
    parsers = {name: Parser(description=run.__doc__, allow_abbrev=False) for name, run in COMMANDS.items()}
    prepare, train, evaluate, predict, export, benchmark, study = parsers.values()
    for parser in (evaluate, predict, export):
        parser.add_argument("run", help="folder of a trained run, or a folder of such folders: an ensemble")
    for parser in (evaluate, predict):
        views = parser.add_mutually_exclusive_group()
        views.add_argument("--rotations", action="store_true", help="average over quarter turns, too")
        views.add_argument("--no-flips", action="store_true", help="do not average over mirror images")
        parser.add_argument("--min-size", type=NonNegativeInt, default=0, help="leave out regions of fewer pixels")
        parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")

    prepare.add_argument("name", choices=DATA_SETS, help="which data set")
    prepare.add_argument("--data-root", default="data", help="where it lies, at any depth, or is put")
    prepare.add_argument("--output", default="data", help="where the lists of images are written")
    prepare.add_argument("--no-download", action="store_true", help="do not fetch what is missing")
    prepare.add_argument("--offline", help="also write the set, augmented once for all, to this new folder")
    prepare.add_class_arguments(DataConfig, "data", skip={"name", "root"})

    folder = train.add_mutually_exclusive_group()
    folder.add_argument("--run", help="the run folder to write; by default checkpoints/NAME-DATE-TIME")
    folder.add_argument("--resume", help="folder of an interrupted run to go on with; its settings are taken from it")

    evaluate.add_argument("--data", choices=DATA_SETS, help="data set; by default the run's own")
    evaluate.add_argument("--data-root", help="where it lies; by default where it lay in training")
    evaluate.add_argument("--split", choices=["train", "val", "test"], default="test", help="which part of it")
    evaluate.add_argument("--compare", help="another run: print the paired difference in Dice")
    evaluate.add_argument("--save", action="store_true", help="also write the scores to the run's metrics.json")

    predict.add_argument("paths", nargs="+", help="image files or folders of them")
    predict.add_argument("--output", help="where to write; by default predictions/RUN")
    predict.add_argument("--truth", help="ground truth, a folder of masks: also writes error maps")
    predict.add_argument("--max-pixels", type=PositiveInt, help="open tiled TIFFs of over 179 million, up to so many")
    predict.add_argument("--gif", action="store_true", help="also write image, probability and mask as an animation")

    export.add_argument("--output", help="the file to write; by default RUN.onnx")
    benchmark.add_argument("--size", type=tuple[PositiveInt, PositiveInt], default=(584, 565), help="height, width")
    benchmark.add_argument("--large", action="store_true", help="also predict 8000 x 8000 pixels on the CPU: minutes")
    benchmark.add_argument("--steps", type=PositiveInt, default=12, help="how often everything is measured")
    study.add_argument("study", help="folder with a grid.yaml, such as checkpoints/study-encoder")
    study.add_argument("--arms", nargs="+", help="train only these; the table shows all")
    for parser in (evaluate, benchmark):
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    for parser in (train, benchmark):
        parser.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
        parser.add_class_arguments(Config)
    return parsers


def report(result: dict, as_json: bool) -> None:
    """Print a dictionary, as one JSON object or a line an entry and, with several classes, a line a class."""

    def show(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {show(item)}" for name, item in value.items())
        if isinstance(value, list):
            return (" to " if value and isinstance(value[0], float) else ", ").join(map(show, value)) or "none"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    plain = {name: value for name, value in result.items() if not name.startswith(("class", "per_class", "confusion"))}
    for index, name in enumerate(result.get("classes", [])):
        scores = {score: result["per_class"][score][index] for score in ("dice", "iou", "sensitivity", "precision")}
        plain[f"class {name}"] = scores | {"dice_ci95": result["per_class_dice_ci95"][index]}
    lines = [f"{name:22} {show(value)}" for name, value in plain.items()]
    print(json.dumps(without_nan(result)) if as_json else "\n".join(lines))


def parse(arguments: list[str]) -> Namespace:
    """Turn a command line into settings; with `train --resume RUN`, the run's own settings come before the flags."""
    parser = Parser(prog="python -m unet_helpers", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in make_parsers().items():
        commands.add_subcommand(name, command, help=command.description.split("\n")[0])
    files, others, words = [], [], iter(arguments[1:])
    for word in words:
        name, _, value = word.partition("=")
        value = os.path.expanduser(value)  # a shell leaves `--output=~/x` as it is
        word = f"{name}={value}" if value else word
        if name in ("--config", "--resume"):
            value = value or next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{name} needs a path: that of a settings file, or of the run to resume.")
            files.append(Path(value) / "config.yaml" if name == "--resume" else Path(value))
            load_config(files[-1])  # names the file if something is wrong with it
            word = f"{name}={value}"
        if name.startswith("--") and name[2:] in SECTIONS and arguments[0] != "evaluate":  # whose --data is a data set
            raise UserError(f"{name} holds many settings: set one as {name}.NAME=VALUE, or give a file to --config.")
        others += [word] if name != "--config" else []
    try:
        return parser.parse_args([*arguments[:1], *(f"--config={file}" for file in files), *others])
    except (AttributeError, LookupError, RecursionError, ValueError) as error:  # what PyYAML raises for odd !!tags
        raise UserError(f"a value on the command line cannot be read: {explain(str(error))}") from error


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        COMMANDS[args.command](args[args.command])
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, RunError, OSError) as error:  # of a path, say, that is too long or may not be read
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        print("error: the memory is full: use smaller images, patches or batches, or another device", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted (an unfinished training goes on with `train --resume RUN`)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be none that can be printed
    sys.exit(main())
