"""Speed side by side, all in one run on one machine: `python .ci/speed.py [--quick]`.

Prints, as text: a training step of our path against a plain PyTorch loop and against the networks of MONAI and
segmentation_models_pytorch; where the time of our step goes; what precision, memory format, compilation and keeping the
data on the device bring; how cost grows with image and batch size; the floor that multiplications alone would need;
prediction; peak memory. Candidates take turns, so that whatever else the machine does
meets all of them alike; a figure is the median over turns, with quartiles. Nothing else should run meanwhile.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from unet_helpers.augmentation import make_augmentation
from unet_helpers.config import Config, DataConfig, TrainingConfig
from unet_helpers.datasets import TrainingPatches, find_samples, load_sample
from unet_helpers.images import field_of_view, normalise
from unet_helpers.losses import SegmentationLoss
from unet_helpers.model import UNet, count_parameters
from unet_helpers.prediction import predict_probabilities
from unet_helpers.system import clock, describe_device, find_device, find_precision, peak_memory
from unet_helpers.training import make_accelerator, train_step

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.networks.nets import UNet as MonaiUNet

PATCH, BATCH = 256, 8  # of the reference recipe
DRIVE = (584, 565)
DEVICE = find_device()


def our_network(base: int = 16) -> nn.Module:
    """The reference run's network; 16 channels at full resolution."""
    return UNet(widths=tuple(base * 2**level for level in range(4)))


def monai_network() -> nn.Module:
    """MONAI's U-Net in its usual form, with residual units, at about our number of parameters."""
    return MonaiUNet(2, 3, 1, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)


def smp_network() -> nn.Module:
    """One of the smallest encoders in smp's U-Net, with a narrow decoder, to come near our number of parameters."""
    name = "tu-tf_mobilenetv3_small_minimal_100"
    return smp.Unet(name, encoder_weights=None, decoder_channels=(32, 24, 16, 12, 8))


NETWORKS = {"ours": our_network, "MONAI UNet": monai_network, "smp Unet, mobilenet": smp_network}
LARGE = {
    "ours, 80 wide": lambda: our_network(80),
    "smp Unet, resnet18": lambda: smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 48, 32, 24, 16)),
}


class Stream(Dataset):
    """The endless stream of `TrainingPatches`, for a plain sampler."""

    def __init__(self, patches: TrainingPatches):
        self.patches = patches

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int):
        return self.patches[number]


class Repeated(Stream):
    """A few samples over and over: what is measured is the network, not the data."""

    def __getitem__(self, number: int):
        return self.patches[number % len(self.patches)]


class Files(Dataset):
    """What a plain loop does: open picture and mask anew for each sample, find the field of view, augment."""

    def __init__(self, samples: list, config: Config, folder: Path):
        self.paths, self.augment = [], make_augmentation(config.augmentation)
        for index, sample in enumerate(samples):
            paths = folder / f"{index}.png", folder / f"{index}_mask.png"
            for path, array in zip(paths, load_sample(sample), strict=True):
                Image.fromarray(array).save(path)
            self.paths.append(paths)

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (np.array(Image.open(path)) for path in self.paths[number % len(self.paths)])
        view = field_of_view(image)
        image, mask, view = self.augment(image, mask, view, number)
        return torch.from_numpy(normalise(image, view).transpose(2, 0, 1).copy()), torch.from_numpy(mask).long()


class Candidate:
    """A network with optimiser and stream of patches; `step` trains once and notes how long its parts took."""

    def __init__(self, network: nn.Module, data: Dataset, plain: bool, batch: int = BATCH):
        config = Config(training=TrainingConfig(precision="fp32" if plain else "auto"))
        self.accelerator: Accelerator = make_accelerator(config)
        self.plain, self.loss, self.times = plain, SegmentationLoss(1), []
        optimiser = torch.optim.AdamW(network.parameters(), 3e-3, fused=None if plain else DEVICE.type != "mps")
        self.average = AveragedModel(network, DEVICE, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        self.network, self.optimiser = self.accelerator.prepare(network.train(), optimiser)
        self.batches = iter(DataLoader(data, batch_size=batch, sampler=range(10**6)))

    def step(self) -> None:
        """One step; the plain loop keeps the default memory format, ours takes `training.train_step` and averages."""
        started = clock(DEVICE)
        images, masks = next(self.batches)
        loaded = clock(DEVICE)
        if self.plain:
            logits = self.network(images.to(DEVICE))
            self.loss(logits, masks.to(DEVICE)).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
        else:
            train_step(self.network, self.optimiser, self.loss, self.accelerator, images, masks, 1.0)
            self.average.update_parameters(self.accelerator.unwrap_model(self.network))
        self.times.append((loaded - started, clock(DEVICE) - started))


def take_turns(work: dict[str, Callable[[], object]], turns: int, steps: int = 2) -> dict[str, np.ndarray]:
    """Seconds of each piece of work: all of them once unmeasured, then in turns."""
    seconds = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, run in work.items():
            for _ in range(steps):
                started = clock(DEVICE)
                run()
                if turn:
                    seconds[name].append(clock(DEVICE) - started)
    return {name: np.array(values) for name, values in seconds.items()}


def row(name: str, seconds: np.ndarray, per: float = 1, note: str = "") -> None:
    """Print the median with quartiles, how many a second `per` makes, and a note."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    rate = f"{per / middle:7.1f} images/s" if per else ""
    print(f"  {name:40} {middle:7.3f} s ({low:.3f} to {high:.3f})   {rate}   {note}")


def parts_of_a_step(batch: tuple, turns: int) -> dict[str, np.ndarray]:
    """Seconds of forward, backward and optimiser of our path."""
    candidate = Candidate(our_network(), [batch], plain=False)
    images, masks = (part.to(DEVICE) for part in batch)
    images, times = images.to(memory_format=torch.channels_last), []
    for _ in range(turns + 1):
        moments = [clock(DEVICE)]
        loss = candidate.loss(candidate.network(images), masks)
        moments.append(clock(DEVICE))
        candidate.accelerator.backward(loss)
        moments.append(clock(DEVICE))
        candidate.accelerator.clip_grad_norm_(candidate.network.parameters(), 1.0)
        candidate.optimiser.step()
        candidate.optimiser.zero_grad()
        moments.append(clock(DEVICE))
        candidate.average.update_parameters(candidate.accelerator.unwrap_model(candidate.network))
        moments.append(clock(DEVICE))
        times.append(np.diff(moments))
    names = ("forward and loss", "backward", "clipping and optimiser", "averaging of the weights")
    return dict(zip(names, np.array(times[1:]).T, strict=True))


def report_steps(config: Config, turns: int) -> None:
    """A training step, data included: ours, the plain loop, other libraries' networks; and where our time goes."""
    samples = [sample for sample in find_samples(config.data) if sample.split == "train"]
    ours = Stream(TrainingPatches(samples, config, quiet=True))
    with tempfile.TemporaryDirectory() as folder:
        files = Files(samples, config, Path(folder))
        candidates = {}
        for name, make in NETWORKS.items():
            candidates[name] = Candidate(make(), ours, plain=False)
            candidates[f"{name}, plain loop"] = Candidate(make(), files, plain=True)
        seconds = steps_in_turns("A training step, data included", candidates, turns)
    ratio = np.median(seconds["ours, plain loop"]) / np.median(seconds["ours"])
    print(f"  ours: {ratio:.2f} times the images a second of the plain loop")
    large = {name: Candidate(make(), ours, plain=False) for name, make in LARGE.items()}
    steps_in_turns("Large networks, a training step with our path", large, max(2, turns // 4))

    print("\nWhere the time of our step goes")
    waits = np.array(candidates["ours"].times)[-2 * turns :, 0]
    parts = {"data": waits} | parts_of_a_step(next(candidates["ours"].batches), turns)
    whole = sum(np.median(values) for values in parts.values())
    for name, values in parts.items():
        row(name, values, 0, f"{np.median(values) / whole:4.0%}")


def steps_in_turns(title: str, candidates: dict[str, Candidate], turns: int) -> dict[str, np.ndarray]:
    """Print what a step of each candidate takes, and return the seconds."""
    print(f"\n{title}")
    seconds = take_turns({name: one.step for name, one in candidates.items()}, turns)
    for name, values in seconds.items():
        row(name, values, BATCH, f"{count_parameters(candidates[name].network) / 1e6:.2f}M parameters")
    return seconds


def report_switches(turns: int, compiled: bool) -> None:
    """What precision, memory format, compilation and data that already lie on the device change in a step of ours."""
    print("\nA training step of our network from tensors in memory, by switches (the first: all of them off)")
    images, masks = torch.randn(BATCH, 3, PATCH, PATCH), torch.randint(0, 2, (BATCH, PATCH, PATCH))
    if DEVICE.type == "cuda":
        images, masks = images.pin_memory(), masks.pin_memory()
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    known = dict.fromkeys(("fp32", find_precision("auto", DEVICE)))
    formats = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
    places = {"host": "cpu", "device": DEVICE} if DEVICE.type != "cpu" else {"host": "cpu"}
    work = {}
    for precision, form, place, way in product(known, formats, places, ("eager", "compiled")[: 1 + compiled]):
        network = our_network().to(DEVICE, memory_format=formats[form]).train()
        optimiser = torch.optim.AdamW(network.parameters(), 3e-3, fused=DEVICE.type != "mps")
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
        model, loss = torch.compile(network) if way == "compiled" else network, SegmentationLoss(1)
        batch = images.to(places[place], memory_format=formats[form]), masks.to(places[place])

        def step(model=model, optimiser=optimiser, scaler=scaler, batch=batch, loss=loss, precision=precision):
            here = torch.autocast(DEVICE.type, precisions[precision]) if precision != "fp32" else nullcontext()
            with here:
                logits = model(batch[0].to(DEVICE, non_blocking=True))
            scaler.scale(loss(logits, batch[1].to(DEVICE, non_blocking=True))).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()

        try:
            step()
        except Exception as error:  # of many kinds: no compiler, a kernel that a device lacks
            print(f"  {precision}, {form}, {way}: not here, {type(error).__name__}")
            continue
        work[f"{precision}, {form}, data on {place}, {way}"] = step
    for name, seconds in take_turns(work, turns).items():
        row(name, seconds, BATCH)


def report_floor() -> None:
    """How long a step would take if it were nothing but multiplications, at the speed of a large matrix product."""
    print("\nThe floor: multiply-adds of our step at the speed of a large matrix product")
    network, images = our_network().to(DEVICE), torch.randn(BATCH, 3, PATCH, PATCH, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    needed, side = counter.get_total_flops() / 2, 2048 if DEVICE.type == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if DEVICE.type == "cuda" else 2]:
        a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        speed = side**3 / np.min(take_turns({"": lambda a=a, b=b: a @ b}, turns=10)[""])
        print(f"  {dtype}: {needed / 1e9:.1f} G at {speed / 1e9:.0f} G/s: {needed / speed:.3f} s")


def report_sizes(turns: int) -> None:
    """Whether the cost of a step, and of a prediction, is linear in the pixels."""
    print("\nOur network: seconds a megapixel (linear: all the same)")
    for batch, side in ((4, 64), (4, 128), (4, 256), (4, 384), (1, 192), (2, 192), (8, 192), (16, 192)):
        data = Repeated([(torch.randn(3, side, side), torch.randint(0, 2, (side, side)))])
        seconds = take_turns({"": Candidate(our_network(), data, plain=False, batch=batch).step}, turns)[""]
        row(f"training, batch {batch:2}, {side}×{side}", seconds / (batch * side**2 / 1e6), 1e6 / side**2)
    network = our_network().to(DEVICE).eval()
    for side in (256, 512, 1024, 1536):
        image = torch.randn(3, side, side, device=DEVICE)
        seconds = take_turns({"": lambda image=image: predict_probabilities(network, image, flips=False)}, turns)[""]
        row(f"prediction, {side}×{side}", seconds / (side**2 / 1e6), 1e6 / side**2)


def report_prediction(turns: int) -> None:
    """What predicting an image of DRIVE's size takes."""
    print(f"\nPrediction of one image, {DRIVE[0]}×{DRIVE[1]}")
    image, work = torch.randn(3, *DRIVE, device=DEVICE), {}
    padded = nn.functional.pad(image[None], (0, -DRIVE[1] % 32, 0, -DRIVE[0] % 32))  # as others need it
    padded = padded.contiguous(memory_format=torch.channels_last)
    for name, make in NETWORKS.items():
        network = make().to(DEVICE, memory_format=torch.channels_last).eval()
        if name == "ours":
            work[name] = lambda network=network: predict_probabilities(network, image, flips=False)
            work["ours, flips averaged"] = lambda network=network: predict_probabilities(network, image)
        else:
            work[name] = torch.inference_mode()(lambda network=network: network(padded))
    for name, values in take_turns(work, turns).items():
        row(name, values)


def report_memory() -> None:
    """Peak memory of a few steps, each network in a process of its own, beyond what its imports take."""
    print("\nPeak memory of training beyond the imported program")
    for name in [*NETWORKS, *(f"{name}, plain loop" for name in NETWORKS)]:
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"  {name:40} {float(done.stdout):6.2f} GiB")


def measure_memory(name: str) -> None:
    """Print what `report_memory` wants to know of one network."""
    before = peak_memory(DEVICE)
    data = Repeated([(torch.randn(3, PATCH, PATCH), torch.randint(0, 2, (PATCH, PATCH)))])
    network, _, plain = name.partition(", plain")
    candidate = Candidate(NETWORKS[network](), data, plain=bool(plain))
    for _ in range(3):
        candidate.step()
    print(peak_memory(DEVICE) - before)


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns: to see that it runs, not to measure")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory_of:
        return measure_memory(args.memory_of)
    turns = 2 if args.quick else 12
    config = Config(data=DataConfig(sample_images=(16, 1, 1), sample_size=576))
    config.augmentation.patch_size = PATCH
    versions = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{describe_device(DEVICE)}, {versions}; patches {PATCH}×{PATCH}, batch {BATCH}")
    report_steps(config, turns)
    report_switches(turns, compiled=not args.quick)
    report_floor()
    report_sizes(turns)
    report_prediction(turns)
    report_memory()


if __name__ == "__main__":
    main()
