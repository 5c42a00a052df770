import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unet_helpers import system
from unet_helpers.config import RunError, UserError
from unet_helpers.system import (
    find_device,
    find_precision,
    make_folder,
    read_tensors,
    without_nan,
    write_json,
    write_tensors,
    write_whole,
)


def test_tensors_and_metadata_survive_the_way_through_a_file(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "b": torch.tensor(3)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"epoch": "4"})
    read, header = read_tensors(tmp_path / "t.safetensors")
    assert header == {"epoch": "4"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert set(load_file(tmp_path / "t.safetensors")) == {"a", "b"}  # the library's own reader agrees


def test_weights_cut_short_or_of_another_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.zeros(1000)})
    for content in (path.read_bytes()[:-100], path.read_bytes()[:20], b"", b"text instead of weights"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors"):
            read_tensors(path)
    with pytest.raises(UserError, match="no such weights"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="make room"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    code = f"""
import os, signal, pathlib
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
from unet_helpers.system import write_whole
write_whole(pathlib.Path({str(path)!r}), "new" * 1000)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert killed.returncode == -9
    assert path.read_text() == "old"


def test_a_disk_without_room_for_a_temporary_array_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RunError, match=r"no room for 0\.0 GiB.*TMPDIR"):
        system.on_disk((10, 10), np.uint8, tmp_path)
    monkeypatch.delattr(os, "posix_fallocate")  # as on Windows and on Macs
    assert system.on_disk((10, 10), np.uint8, tmp_path).shape == (10, 10)
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: SimpleNamespace(free=99))
    with pytest.raises(RunError, match="no room"):
        system.on_disk((10, 10), np.uint8, tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_weights_that_were_read_are_mapped_to_no_file(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"a": torch.arange(100_000)})
    tensors, _ = read_tensors(tmp_path / "w.safetensors")
    with open("/proc/self/maps") as maps:
        assert "w.safetensors" not in maps.read()
    assert tensors["a"][-1] == 99_999


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            make_folder(path)
    assert make_folder(tmp_path / "new" / "folder").is_dir()
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_nan_becomes_null_because_json_has_none(tmp_path):
    write_json(tmp_path / "j.json", {"a": [1.0, float("nan")], "b": {"c": float("nan"), "d": "é"}})
    text = (tmp_path / "j.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.0, None], "b": {"c": None, "d": "é"}}
    assert without_nan({"x": 1}) == {"x": 1}


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cuda"):
        find_device("cuda")
    assert find_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_fastest_device_is_found_by_itself(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto").type == expected


def test_precision_follows_what_the_hardware_computes_in(monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert find_precision("auto", gpu) == expected  # a T4 (7.5) says it has bf16, and emulates it
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(system, "has_native_bf16", lambda native=native: native)
        assert find_precision("auto", torch.device("cpu")) == expected
    assert find_precision("auto", torch.device("mps")) == "fp32"
    assert find_precision("fp16", gpu) == "fp16"
    with pytest.raises(UserError, match="fp16"):
        find_precision("fp16", torch.device("cpu"))
    with pytest.raises(UserError, match=r"training\.precision is bf16.*mps"):
        find_precision("bf16", torch.device("mps"))
    assert system.memory_format(torch.device("mps")) is torch.contiguous_format
    assert system.memory_format(gpu) is torch.channels_last


def test_text_that_is_no_utf8_is_written_all_the_same(tmp_path):
    write_json(tmp_path / "a.json", {"name": "\udce9il1"})
    assert "udce9il1" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            system.write_whole(path, "text")
    assert not list(tmp_path.iterdir())


def test_the_real_error_is_told_when_even_the_name_is_impossible(tmp_path):
    with pytest.raises(UserError, match="too long"):
        write_whole(tmp_path / ("a" * 300), b"")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_memory_that_is_kept_is_not_asked_for_again():
    script = """
import resource, numpy
from unet_helpers.system import keep_memory
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        numpy.ones(8_000_000)  # 64 MB, which is freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = pages()
keep_memory()
pages()
print(before, pages())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before < 1000:
        pytest.skip("this C library keeps large buffers anyway")
    assert after < before / 10
