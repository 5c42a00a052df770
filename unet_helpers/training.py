"""Train a network: one loop that runs the same on a CPU, on one GPU and, through `torchrun`, on several.

Epochs depend on each other through weights and optimiser alone: patches are drawn from (seed, epoch, index), dropout
from (seed, epoch). So a checkpoint holds everything, and a run killed and resumed ends with the weights of one that was
not. Several processes share each batch: gradients, losses and scores are those of the whole batch; only batch norm's
statistics are each process's own, as everywhere in torch without `SyncBatchNorm` (group norm has none to share).
"""

import math
import platform
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, state, utils
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from unet_helpers import system
from unet_helpers.config import IGNORE, Config, RunError, UserError, check_config
from unet_helpers.datasets import TrainingPatches, WholeImages, settle
from unet_helpers.evaluation import choose_threshold, samples_of, score_images, summarise, validate
from unet_helpers.images import view_diameter
from unet_helpers.losses import SegmentationLoss
from unet_helpers.model import build_model, center_crop, count_parameters
from unet_helpers.runs import LAST, Progress, load_network, load_state, new_run, save_epoch, write_history


def train(config: Config, run: Path | str, resume: bool = False, quiet: bool = False) -> dict:
    """Train a network, write its run folder and return the content of `metrics.json`, on the main process.

    The folder `run` holds no run yet; to `resume`, an interrupted one, which goes on after its last finished epoch, and
    whose settings `config` must be, but for where and how fast it runs. `quiet` prints nothing. `UserError` for wrong
    settings or data, before anything is written, and `RunError` if the loss is no number, or memory or disk are full.
    """
    check_config(config)
    config = replace(config, data=settle(config.data))
    run, settings = Path(run), config.training
    accelerator = make_accelerator(config, run)
    main, device, processes = accelerator.is_main_process, accelerator.device, accelerator.num_processes
    if settings.batch_size % processes:
        raise UserError(f"training.batch_size is {settings.batch_size}: {processes} processes cannot share it evenly.")
    patches = TrainingPatches(samples_of(config, "train"), config, quiet)
    validation = WholeImages(samples_of(config, "val"), config, native=False)
    scored = [bool((mask != IGNORE).any()) for _, mask, _ in validation]  # finds damaged files before the first epoch
    if not any(scored):
        raise UserError(f"{validation.samples[0].mask}: it and all validation masks hold nothing but 255: mend them.")

    torch.manual_seed(config.seed)
    begun = resume and (run / LAST).is_file()  # then its weights are there, and those it started from may be gone
    network = build_model(replace(config.model, weights=None, encoder_weights=None) if begun else config.model)
    network.output_size(int(np.min(config.augmentation.patch_size)))  # too small for valid padding? say it here
    average = AveragedModel(network, device, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
    decay, fused = settings.weight_decay, device.type != "mps"
    optimiser = torch.optim.AdamW(parameter_groups(network), settings.learning_rate, weight_decay=decay, fused=fused)
    model, optimiser = accelerator.prepare(network, optimiser)  # from here on `model(x)` computes in mixed precision
    loss_function = SegmentationLoss(config.model.num_classes, settings.dice_weight, settings.class_weights)
    if main:
        new_run(run, config, resume)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")
    progress = load_state(run, network, average, optimiser, accelerator.scaler) if resume else Progress()
    names = [patches.names, [sample.name for sample in validation.samples]]
    if progress.images not in ([], names):
        raise UserError(f"{run}: cannot be resumed, as its images are no longer those it began with; start a new run.")
    progress.images = names

    steps = settings.steps_per_epoch or math.ceil(len(patches) / settings.batch_size)
    total, process = steps * settings.epochs, accelerator.process_index
    batches = shared_batches(progress.epoch * steps, total, settings.batch_size, process, processes)
    options = {"num_workers": settings.workers, "worker_init_fn": ignore_interrupt, "pin_memory": device.type == "cuda"}
    loader = iter(DataLoader(patches, batch_sampler=batches, **options))

    def close_epoch(rate: float, train_loss: float | None, speed: float | None, started: float) -> None:
        utils.broadcast(list(average.buffers()))  # batch norm's statistics: all validate the network that is saved
        scores = validate(average.module, validation, loss_function, accelerator)
        progress.record(progress.epoch * steps, rate, train_loss, speed, time.perf_counter() - started, scores)
        if main:
            save_epoch(run, config, progress, network, average, optimiser, accelerator.scaler)
            accelerator.log(progress.history[-1], progress.epoch)  # to TensorBoard, if that is set
            if not quiet:
                tqdm.write(progress.line(settings.epochs))

    try:
        if not progress.history:
            close_epoch(0.0, None, None, time.perf_counter())  # row 0: the untrained network
        for epoch in range(progress.epoch, settings.epochs):
            mixed = np.random.SeedSequence([config.seed, epoch, process]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(mixed) >> 1)
            model.train()
            losses, started = torch.zeros((), device=device), time.perf_counter()
            bar = tqdm(range(steps), f"epoch {epoch + 1}", leave=False, disable=quiet or not main, unit="step")
            for step in bar:
                rate = learning_rate(epoch * steps + step, total, settings.learning_rate, settings.warmup)
                frozen = epoch * steps + step < settings.encoder_frozen * total
                factors = 1.0, 0.0 if frozen else settings.encoder_rate
                for group, factor in zip(optimiser.param_groups, factors, strict=False):  # `UNet` has one group
                    group["lr"] = rate * factor
                images, masks = next(loader)
                loss = train_step(model, optimiser, loss_function, accelerator, images, masks, settings.clip_norm)
                average.update_parameters(network)
                losses += loss
                if step % 10 == 0:
                    check_finite(loss, epoch, step)
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            check_finite(losses, epoch, step)
            progress.epoch = epoch + 1
            speed = steps * settings.batch_size / (time.perf_counter() - started)
            close_epoch(rate, losses.item() / steps, speed, started)
        metrics = finish(run, config, progress, accelerator, validation, patches)
        accelerator.end_training()
        return metrics
    except (UserError, RunError) as error:  # a loader worker's comes with its traceback before it
        raise type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from error
    except (MemoryError, RuntimeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            raise RunError("Batch norm has a single value to normalise: raise training.batch_size.") from error
        if re.search("(?s)DataLoader worker.*(exited|killed by signal|allocate shared memory)", str(error)):
            remedy = "lower training.workers (in Docker also: raise --shm-size), then go on with --resume."
            raise RunError(f"A process that prepares data was killed, as when the memory is full: {remedy}") from error
        if not system.memory_is_full(error):
            raise
        sizes = f"training.batch_size (now {settings.batch_size}) or augmentation.patch_size"
        remedy = f"lower {sizes} (now {config.augmentation.patch_size}), then start again."
        raise RunError(f"The memory of {device} is full; {remedy} Or --resume with --training.device=cpu.") from error


def finish(run: Path, config: Config, progress: Progress, accelerator, validation, patches: TrainingPatches) -> dict:
    """Choose the threshold on the validation images, as `evaluate` will see them, and write `metrics.json`."""
    metrics, device, num_classes = {}, accelerator.device, config.model.num_classes
    if accelerator.is_main_process:
        network = load_network(run, config).to(device)
        native = WholeImages(validation.samples, config)
        diameters = [view_diameter(patches.decoded[index][2]) or 0 for index in range(len(patches))]
        alike = max(diameters) <= 1.1 * min(diameters)  # else, or without a round view, pictures keep their size
        network.view_diameter = (float(np.median(diameters)) or None) if alike else None
        threshold = choose_threshold(network, native, device) if num_classes == 1 else None
        result = score_images(network, native, num_classes, device, threshold)
        seconds = round(sum(row["seconds"] for row in progress.history), 1)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        metrics = {"threshold": threshold, "best_epoch": progress.best_epoch, "epochs": config.training.epochs}
        metrics |= {"steps": progress.history[-1]["step"], "parameters": count_parameters(network)}
        metrics |= {"training_images": patches.names, "view_diameter": network.view_diameter, "seconds": seconds}
        metrics |= {"device": system.describe_device(device), "processes": accelerator.num_processes}
        metrics |= {"precision": accelerator.mixed_precision, "versions": versions}
        metrics |= {"val": summarise(result, threshold, config.augmentation.flips)}
        write_history(run, progress.history)
        system.write_json(run / "metrics.json", metrics)
    accelerator.wait_for_everyone()
    return metrics


def make_accelerator(config: Config, run: Path | None = None) -> Accelerator:
    """Hugging Face's wrapper for devices, processes and mixed precision, set as the configuration asks."""
    device = system.find_device(config.training.device)
    precision = system.find_precision(config.training.precision, device)
    if device.type == "cpu":
        system.keep_memory()
    if not torch.distributed.is_initialized():
        # Otherwise a second run in the same notebook keeps the first one's device and precision.
        state.AcceleratorState._reset_state(reset_partial_state=True)
    # Some encoders have layers that the decoder does not use; and all wait for the process that scores at the end.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.model.architecture != "unet")
    return Accelerator(
        kwargs_handlers=[unused, utils.InitProcessGroupKwargs(timeout=timedelta(days=1))],
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="tensorboard" if run and config.training.tensorboard else None,
        project_dir=run / "state" if run else None,
    )


def train_step(model, optimiser, loss_function, accelerator, images: Tensor, masks: Tensor, clip_norm: float) -> Tensor:
    """One step on this process's share of a batch; returns the loss of the whole batch, by a `SegmentationLoss`.

    `images` are float32 (B, C, H, W); `masks` int64 (B, H, W), 255 where nothing is learned, and cropped to the output
    where convolutions are valid. A gradient whose norm exceeds `clip_norm` is shortened to it, unless that is 0.
    """
    device = accelerator.device  # to Apple's GPU, asynchronous copies have given wrong results
    images = images.to(device, memory_format=system.memory_format(device), non_blocking=device.type == "cuda")
    masks = masks.to(device, non_blocking=device.type == "cuda")
    logits = model(images)
    reduce = (lambda sums: accelerator.reduce(sums, "sum")) if accelerator.num_processes > 1 else None
    loss = loss_function(logits, center_crop(masks, logits.shape[-2:]), reduce)
    accelerator.backward(loss)
    if clip_norm:
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach()


def parameter_groups(network: nn.Module) -> list[dict]:
    """The parameters for the optimiser; those of an encoder of segmentation_models_pytorch in a second group."""
    groups = [[], []]
    for name, parameter in network.named_parameters():
        groups[name.startswith("net.encoder.")].append(parameter)
    return [{"params": group} for group in groups if group]


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Learning rate of step `step` of `total`: a linear rise over the share `warmup`, then half a cosine down to 0."""
    rise = max(round(total * warmup), 1)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / max(total - rise, 1)))


def shared_batches(start: int, stop: int, batch_size: int, process: int, processes: int) -> Iterator[range]:
    """The patches that a process takes of each batch, which in step s is from s·B to s·B + B - 1, `stop` left out."""
    share = batch_size // processes
    firsts = (step * batch_size + process * share for step in range(start, stop))
    return (range(first, first + share) for first in firsts)


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends its loader workers quietly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_finite(loss: Tensor, epoch: int, step: int) -> None:
    """Stop as soon as the loss is not a number: no checkpoint is written, the last one stays."""
    if not math.isfinite(loss.item()):
        remedy = "try a lower training.learning_rate, training.precision=fp32, or training.clip_norm=1."
        raise RunError(f"The loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}: {remedy}")
