"""What this machine offers: a device to compute on, the precision it is fast in, and a disk to write on.

Every file is written whole or not at all, and reading one executes nothing from it: weights are safetensors.
"""

import csv
import ctypes
import errno
import io
import json
import math
import mmap
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from unet_helpers.config import RunError, UserError, one_line


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`, or `UserError` if it is not there; `auto` takes CUDA, Apple's MPS, or the CPU."""
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, there in devices.items() if there]
    if name not in ("auto", *found):
        raise UserError(f"the device asked for is {name}, but torch finds only {', '.join(found)} here.")
    return torch.device(found[0] if name == "auto" else name)


def find_precision(name: str, device: torch.device) -> str:
    """The precision called `name` on `device`: `fp32`, `bf16` or `fp16`; `UserError` if it cannot compute in that.

    `auto` asks what the hardware computes in natively: a T4 (compute capability 7.5) emulates bf16, slowly, so below
    capability 8.0 it is fp16, with a gradient scaler; a CPU needs bf16 instructions (those of Arm are not asked for).
    """
    if (name, device.type) in (("fp16", "cpu"), ("fp16", "mps"), ("bf16", "mps")):
        raise UserError(f"training.precision is {name}, which is not for the device {device.type}; use auto or fp32.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and has_native_bf16() else "fp32"


def memory_is_full(error: Exception) -> bool:
    """Whether an error says so; only CUDA has a type of its own for it."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); emulated bf16 is slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def keep_memory() -> None:
    """Let glibc keep large buffers for the next step instead of handing them back to the system (Linux only).

    Else it zeroes them anew, up to a fifth of a training step. The price: the process stays as large as it ever was.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
        for option, value in ((-4, 0), (-1, -1)) if mallopt else ():  # M_MMAP_MAX: no mappings; M_TRIM_THRESHOLD: never
            mallopt(option, value)


def describe_device(device: torch.device) -> str:
    """One line on the hardware, for reports and `metrics.json`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    cpu = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"Apple GPU ({platform.processor()})" if device.type == "mps" else cpu


def measure(work: Callable[[], object], device: torch.device, steps: int, warmup: int) -> dict[str, float]:
    """The `spread` of the seconds that each of `steps` runs of `work` takes."""
    moments = [clock(device)]
    for _ in range(warmup + steps):
        work()
        moments.append(clock(device))
    return spread(np.diff(moments)[warmup:])


def memory_format(device: torch.device) -> torch.memory_format:
    """How images best lie in memory: channels last, but not on Apple's GPU, where that has given wrong results."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def clock(device: torch.device) -> float:
    """The time, once everything handed to the device has been done."""
    getattr(torch, device.type).synchronize()  # on a CPU it does nothing
    return time.perf_counter()


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("median", "low", "high"), np.percentile(values, [50, 25, 75]).tolist(), strict=True))


def peak_memory(device: torch.device | None = None) -> float:
    """GiB of CUDA memory allocated at most; elsewhere of the process, libraries included (Linux, else NaN)."""
    if device and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # unlike `getrusage` it forgets what the program used that started this one
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20 if status.exists() else math.nan


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors (copies: Windows replaces no file in use) and metadata; `UserError` if damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such weights file.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged or no safetensors file ({one_line(error)}); get it again.") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, metadata))


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary as JSON, whole or not at all. NaN and infinity, which JSON does not know, become null."""
    write_whole(path, json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write these columns of the rows as CSV, whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue())


def without_nan(value: object) -> object:
    """The same nested value, as JSON holds it, with None for every NaN and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all: a reader, or a crash, sees the old file or the new one, never a part.

    Raises `RunError` if the disk is full or fails, `UserError` if the place cannot be written.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        # File names that are no UTF-8 occur in old archives; they must not stop what is written at a training's end.
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The place to write a file of any size, which becomes `path` at the end and is gone if that fails; see above."""
    temporary = path.parent / f".{path.name}.{os.getpid()}-{time.time_ns()}.part"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        for wait in (0.1, 0.4, 1.6, 0):  # on Windows a virus scanner or OneDrive may hold a file for a moment
            with suppress(PermissionError) if wait else nullcontext():
                return os.replace(temporary, path)
            time.sleep(wait)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # gone after `replace`; and nothing here may hide why the writing failed
            temporary.unlink()


def write_error(path: Path, error: OSError) -> RunError | UserError:
    """The error to raise when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        return RunError(f"{path}: could not be written ({error.strerror}); make room. What was there is unharmed.")
    return UserError(f"{path}: cannot be written ({error.strerror}); choose another place.")


def make_folder(path: Path) -> Path:
    """Make a folder and check that files can be written into it; raises `write_error` if not, or if it is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise write_error(path, error) from None
    return path


def on_disk(shape: tuple[int, ...], dtype: type, folder: str | Path | None = None) -> np.ndarray:
    """A memory-mapped array whose temporary file is gone with it; `RunError` if the disk has no room."""
    folder, size = folder or tempfile.gettempdir(), math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # taken now: a disk that is full later would kill the program
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(folder).free < size:
                raise OSError("too little is free")
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        problem = f"has no room for {size / 2**30:.1f} GiB ({one_line(error)})"
        raise RunError(f"{folder}: {problem}: free some, or name a folder by TMPDIR") from error


def let_go(array: np.ndarray) -> None:
    """Take what was touched of an array `on_disk` out of memory, where the system can; on the disk it stays."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
