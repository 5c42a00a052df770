"""How fast a network trains and predicts on this machine, as medians with their spread, and what it needs."""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch.utils.data import DataLoader

from unet_helpers.config import Config, check_config
from unet_helpers.datasets import TrainingPatches, decode
from unet_helpers.evaluation import samples_of
from unet_helpers.losses import SegmentationLoss
from unet_helpers.model import build_model, count_parameters
from unet_helpers.prediction import predict_probabilities
from unet_helpers.system import describe_device
from unet_helpers.training import make_accelerator, shared_batches, train_step


def benchmark(config: Config, size: tuple[int, int] = (584, 565), steps: int = 12, warmup: int = 3) -> dict:
    """Measure training and prediction with the configured model, data and device.

    Each is done `warmup` times unmeasured (the first steps choose kernels and fill caches), then `steps` times; the
    image predicted has `size` (height, width), by default DRIVE's. Returns the `spread` of images trained on per second
    and of the seconds of a training step, waiting for its data (`data_share` of it), reading an image (`decode`) or
    taking it from memory or cache (`cached`), and predicting one without and with flips.
    """
    check_config(config)
    accelerator, settings = make_accelerator(config), config.training
    device = accelerator.device
    patches = TrainingPatches(samples_of(config, "train"), config)
    torch.manual_seed(config.seed)
    network = build_model(config.model).to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, fused=device.type != "mps")
    model, optimiser = accelerator.prepare(network, optimiser)
    loss_function = SegmentationLoss(config.model.num_classes, settings.dice_weight)
    batches = shared_batches(0, warmup + steps, settings.batch_size, 0, 1)
    loader = iter(DataLoader(patches, batch_sampler=batches, num_workers=settings.workers))
    times = []
    for _ in range(warmup + steps):
        started = clock(device)
        images, masks = next(loader)
        loaded = clock(device)
        train_step(model, optimiser, loss_function, accelerator, images, masks, settings.clip_norm)
        times.append((loaded - started, clock(device) - started))
    waits, totals = np.array(times[warmup:]).T

    plain = build_model(config.model).to(device, memory_format=torch.channels_last).eval()
    image = torch.randn(3, *size, device=device)
    samples, turns = cycle(patches.decoded.samples), cycle(range(len(patches.decoded)))
    timed = partial(measure, device=device, steps=steps, warmup=warmup)
    return {
        "device": describe_device(device),
        "precision": accelerator.mixed_precision,
        "parameters": count_parameters(plain),
        "batch_size": settings.batch_size,
        "patch_size": config.augmentation.patch_size,
        "image_size": list(size),
        "training_step_seconds": spread(totals),
        "data_seconds": spread(waits),
        "data_share": float(waits.sum() / totals.sum()),
        "images_per_second": spread(settings.batch_size / totals),
        "decode_seconds": timed(lambda: decode(next(samples), config.data.longest_side)),
        "cached_seconds": timed(lambda: [np.array(part) for part in patches.decoded[next(turns)]]),
        "predict_seconds": timed(lambda: predict_probabilities(plain, image, False)),
        "predict_flips_seconds": timed(lambda: predict_probabilities(plain, image)),
        "peak_memory_gib": peak_memory(device),
    }


def measure(work: Callable[[], object], device: torch.device, steps: int, warmup: int) -> dict[str, float]:
    """The `spread` of the seconds that each of `steps` runs of `work` takes."""
    seconds = []
    for _ in range(warmup + steps):
        started = clock(device)
        work()
        seconds.append(clock(device) - started)
    return spread(np.array(seconds[warmup:]))


def clock(device: torch.device) -> float:
    """The time, once everything handed to the device has been done."""
    getattr(torch, device.type).synchronize()  # on a CPU it does nothing
    return time.perf_counter()


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("median", "low", "high"), np.percentile(values, [50, 25, 75]).tolist(), strict=True))


def peak_memory(device: torch.device) -> float:
    """GiB of CUDA memory allocated at most; elsewhere of the whole process's memory, libraries included (Unix only)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
