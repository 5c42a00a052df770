"""Things that go wrong while the program works, and files that mean harm: one line, nothing lost, and it goes on."""

import errno
import io
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import kagglehub.exceptions
import numpy as np
import pytest
import requests
import torch
import yaml
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file

from unet_helpers import datasets, system, training
from unet_helpers.__main__ import main
from unet_helpers.config import DataConfig, RunError, UserError, load_config, to_dict
from unet_helpers.datasets import TrainingPatches, find_samples
from unet_helpers.images import read_image
from unet_helpers.losses import SegmentationLoss
from unet_helpers.prepare import prepare
from unet_helpers.pretrained import load_encoder
from unet_helpers.runs import load_run, read_history
from unet_helpers.studies import load_grid, run_study
from unet_helpers.system import read_tensors, write_whole
from unet_helpers.tests.test_prepare import stub_kagglehub, write_drive, write_folder
from unet_helpers.training import train

KILLS = 22
WEIGHTS, LAST = "model.safetensors", "state/last.safetensors"
loaders_fork = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs loader workers by fork")
can_fork = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs os.fork")


@pytest.fixture
def config(small_config):
    """Three epochs of two steps, with drop-out, which draws random numbers in the network itself."""
    small_config.model = replace(small_config.model, dropout=0.5)
    small_config.training = replace(small_config.training, epochs=3, steps_per_epoch=2)
    return small_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of `config` that nothing interrupted."""
    from unet_helpers.tests.conftest import make_small_config

    settings = make_small_config()
    settings.model.dropout, settings.training.epochs, settings.training.steps_per_epoch = 0.5, 3, 2
    run = tmp_path_factory.mktemp("whole") / "run"
    train(settings, run, quiet=True)
    return run


def same(run: Path, other: Path) -> bool:
    """Whether all weights, those of the checkpoint too, and the history are equal to the last bit."""
    for name in (WEIGHTS, LAST):
        a, b = load_file(run / name), load_file(other / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    rows = [
        [row | {"seconds": 0, "images_per_second": 0} for row in read_history(p / "history.csv")] for p in (run, other)
    ]
    return rows[0] == rows[1]


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".part", ".probe"))]


# ---- training
@can_fork
def test_a_run_killed_at_any_of_many_moments_ends_with_the_same_weights(config, whole, tmp_path):
    """`kill -9`, by the process itself, before its n-th step of training or of writing a file, n drawn at random."""
    rng, kills, finished, in_a_row = np.random.default_rng(0), 0, 0, 0
    run = tmp_path / "0"
    while kills < KILLS or finished < 3 or (run / "config.yaml").exists():
        moment = int(rng.integers(1, 16)) if in_a_row < 8 and kills < KILLS else 10**9
        child = os.fork()
        if not child:
            signal.alarm(120)  # ends it, should it wait for a lock that a thread held while it was made
            count = itertools.count(1)

            def counted(real, count=count, moment=moment):
                def call(*arguments, **options):
                    if next(count) == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return call

            os.fsync, os.replace, system.save = counted(os.fsync), counted(os.replace), counted(system.save)
            training.train_step = counted(training.train_step)
            try:
                train(config, run, resume=(run / "config.yaml").exists(), quiet=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        kills, in_a_row = (kills + 1, in_a_row + 1) if status else (kills, 0)
        for name in (WEIGHTS, LAST):
            if (run / name).exists():
                load_file(run / name)  # whole at any moment
        if status == 0:
            assert same(run, whole)
            finished += 1
            run = tmp_path / str(finished)
    assert kills >= 20
    assert finished >= 3


FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def failing(monkeypatch, error: OSError, moment: int) -> None:
    """The `moment`-th opening, writing, flushing or renaming of a file fails, and so do all after it."""
    count = itertools.count(1)

    def may_fail(real):
        def call(*arguments, **options):
            if next(count) >= moment:
                raise error
            return real(*arguments, **options)

        return call

    class Writer:
        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115
            self.write, self.flush, self.fileno = may_fail(self.file.write), self.file.flush, self.file.fileno

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(system, "open", may_fail(Writer), raising=False)
    monkeypatch.setattr(os, "fsync", may_fail(os.fsync))
    monkeypatch.setattr(os, "replace", may_fail(os.replace))


@pytest.mark.parametrize("moment", [1, 3, 7, 20, 23, 32])
def test_a_disk_that_fails_at_some_moment_of_training_loses_nothing(config, whole, tmp_path, monkeypatch, moment):
    error, kind, words = (READ_ONLY, UserError, "place") if moment in (1, 23) else (FULL, RunError, "make room")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, error, moment)
        with pytest.raises(kind, match=f"{run}.*{words}") as caught:
            train(config, run, quiet=True)
    assert "\n" not in str(caught.value)
    assert litter(tmp_path) == []
    train(config, run, resume=(run / "config.yaml").exists(), quiet=True)
    assert same(run, whole)


def test_a_resumed_run_whose_folder_cannot_be_written_trains_nothing(config, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(system.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(READ_ONLY))
        patch.setattr(training, "load_state", lambda *_: pytest.fail("went on"))
        with pytest.raises(UserError, match=f"{run}.*cannot be written"):
            train(config, run, resume=True, quiet=True)
    train(config, run, resume=True, quiet=True)
    assert same(run, whole)


@pytest.mark.parametrize("name", ["losses.png", "metrics.json"])
def test_a_disk_that_is_full_at_the_very_end_loses_nothing(config, whole, tmp_path, monkeypatch, name):
    run, real = tmp_path / "run", os.replace

    def replace_unless_full(source, target):
        if Path(target).name == name:
            raise FULL
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_unless_full)
        with pytest.raises(RunError, match=f"{name}.*make room"):
            train(config, run, quiet=True)
    assert not (run / "metrics.json").exists()
    assert litter(tmp_path) == []
    train(config, run, resume=True, quiet=True)
    assert same(run, whole)
    assert (run / name).exists()


def test_a_file_system_that_is_really_full(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        write_whole(place / "a", b"a" * 40_000)
        with pytest.raises(RunError, match="make room"):
            write_whole(place / "a", b"b" * 40_000)
        assert (place / "a").read_bytes() == b"a" * 40_000
        assert os.listdir(place) == ["a"]
        write_whole(place / "a", b"b" * 20_000)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_file_larger_than_the_system_allows(tmp_path):
    """A real refusal that needs no privileges: EFBIG."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_whole(tmp_path / "a", b"a" * 40_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
        with pytest.raises(RunError, match=r"a: could not be written .*make room"):
            write_whole(tmp_path / "a", b"b" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").read_bytes() == b"a" * 40_000
    assert os.listdir(tmp_path) == ["a"]
    write_whole(tmp_path / "a", b"b" * 100_000)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ENOSPC", RunError), ("EDQUOT", RunError), ("EIO", RunError), ("EACCES", UserError), ("EROFS", UserError)],
)
def test_a_full_disk_asks_for_room_and_a_closed_one_for_another_place(tmp_path, name, kind):
    error = system.write_error(tmp_path / "a", OSError(getattr(errno, name), "why"))
    assert type(error) is kind
    words = "could not be written (why); make room" if kind is RunError else "cannot be written (why); choose another"
    assert str(error).startswith(f"{tmp_path / 'a'}: {words}")


def test_a_checkpoint_folder_with_a_file_in_the_way(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state").write_text("mine")
    with pytest.raises(UserError, match="state"):
        train(config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "state").read_text() == "mine"


@loaders_fork
@pytest.mark.parametrize("how", ["dies", "misses a file", "fills the disk"])
def test_a_loader_worker_that_fails_is_told_in_one_line(config, whole, tmp_path, monkeypatch, how):
    real, parent = TrainingPatches.__getitem__, os.getpid()

    def fails(self, number):
        if os.getpid() != parent and number >= 12:  # in the second epoch
            if how == "dies":
                os._exit(1)
            raise UserError("photo.png: is gone") if how == "misses a file" else RunError("cache.npy: make room")
        return real(self, number)

    config.training.workers = 1
    with monkeypatch.context() as patch:
        patch.setattr(TrainingPatches, "__getitem__", fails)
        kind, words = {
            "dies": (RunError, r"^A process .*training\.workers"),
            "misses a file": (UserError, r"^photo\.png: is gone$"),
            "fills the disk": (RunError, r"^cache\.npy: make room$"),
        }[how]
        with pytest.raises(kind, match=words) as caught:
            train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [0, 3, 5])
def test_gradients_that_are_no_numbers_stop_training_before_they_are_saved(config, whole, tmp_path, monkeypatch, step):
    """The loss itself stays a number in that step; 5 is the last of all."""
    real, steps = SegmentationLoss.forward, itertools.count()

    def forward(self, logits, *rest):
        if logits.requires_grad and next(steps) == step:
            logits.register_hook(lambda gradient: gradient * float("nan"))
        return real(self, logits, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationLoss, "forward", forward)
        with pytest.raises(RunError, match="learning_rate"):
            train(config, tmp_path / "run", quiet=True)
    saved = {**load_file(tmp_path / "run" / LAST), **load_file(tmp_path / "run" / WEIGHTS)}
    assert all(value.isfinite().all() for value in saved.values())
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("package", ["jsonargparse", "torch"])
def test_ctrl_c_while_packages_are_imported(tmp_path, package):
    code = f"""
import builtins, os, runpy, signal, sys, time
real = builtins.__import__
def interrupted(name, *rest, **more):
    if name == "{package}":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    return real(name, *rest, **more)
builtins.__import__ = interrupted
sys.argv = ["unet_helpers", "evaluate", "none"]
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("unet_helpers", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--training my.yaml", r"--training holds many settings: set one as --training\.NAME=VALUE"),
        ("--run mydata --data.root ./model --data.name folder", "error: model: no such folder"),
        ("--config", "--config needs a path"),
        ("--config --run new", "--config needs a path"),
        ("--resume=", "--resume needs a path"),
        ("--training.epochs three", r"training\.epochs is three, but it must be int\."),
        (
            "--training.class_weights [1,a]",
            r"training\.class_weights is \[1, 'a'\], but it must be tuple\[float, \.\.\.\]",
        ),
    ],
)
def test_flags_with_a_wrong_value_are_told_apart(tmp_path, monkeypatch, capsys, words, told):
    (tmp_path / "my.yaml").write_text("epochs: 3\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert os.listdir() == ["my.yaml"]


def test_infinity_becomes_null_because_json_has_none(tmp_path):
    system.write_json(tmp_path / "a.json", {"a": [float("inf"), 1.5], "b": -float("inf")})
    assert (tmp_path / "a.json").read_text().split() == ["{", '"a":', "[", "null,", "1.5", "],", '"b":', "null", "}"]


# ---- fetching DRIVE
def response(status: int) -> requests.Response:
    answer = requests.Response()
    answer.status_code = status
    return answer


@pytest.mark.parametrize(
    "error",
    [
        requests.exceptions.ConnectionError("HTTPSConnectionPool: Max retries exceeded\n(Name or service not known)"),
        requests.exceptions.ReadTimeout("timed out"),
        requests.exceptions.ChunkedEncodingError("Connection broken: IncompleteRead"),
        kagglehub.exceptions.KaggleApiHTTPError("403 Client Error.", response(403)),
        kagglehub.exceptions.DataCorruptionError("The X-Goog-Hash md5 checksum didn't match"),
        kagglehub.exceptions.BackendError("No files"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("Unsupported archive type"),
        EOFError("Compressed file ended before the end-of-stream marker was reached"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_download_that_fails(tmp_path, monkeypatch, capsys, error):
    def fail(name):
        raise error

    stub_kagglehub(monkeypatch, fail)
    root = tmp_path / "data"
    assert main(["prepare", "drive", "--data-root", str(root), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(root) in told
    assert "zionfuo/drive2004" in told  # where to get it by hand
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["half", "wrong"])
def test_half_a_download_and_a_wrong_archive_leave_nothing_in_the_way_of_the_next_try(tmp_path, monkeypatch, what):
    archive, root = tmp_path / "archive", tmp_path / "data"
    write_drive(archive / "DRIVE")
    other = tmp_path / "other"
    if what == "half":
        write_drive(other / "DRIVE", count=7)
    else:
        write_folder(other)
    stub_kagglehub(monkeypatch, lambda name: str(other))
    with pytest.raises(UserError, match=f"could not be downloaded.*{other}"):  # which is what has to be deleted
        prepare(DataConfig("drive", str(root)), tmp_path / "out", download=True)
    assert not (tmp_path / "out").exists()
    assert not (root / "DRIVE").exists()
    stub_kagglehub(monkeypatch, lambda name: str(archive))
    assert "40 images" in prepare(DataConfig("drive", str(root)), tmp_path / "out", download=True)


# ---- the cache
def test_a_cache_that_vanishes_fills_the_disk_or_holds_something_else(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 0)
    config.data = write_folder(tmp_path / "set")
    samples = find_samples(config.data)
    with monkeypatch.context() as patch:
        failing(patch, FULL, 8)
        with pytest.raises(RunError, match=r"cache.*npy.*make room"):
            TrainingPatches(samples, config, quiet=True)
    assert litter(tmp_path) == []
    assert 0 < len(list(tmp_path.rglob("*.npy"))) < 3
    patches = TrainingPatches(samples, config, quiet=True)
    expected = [patches[number] for number in range(4)]
    files = sorted(tmp_path.rglob("*.npy"))
    for spoil in (
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_text("x"),
    ):
        spoil(files[0])
        files[1].write_bytes(files[2].read_bytes())  # another image's
        again = TrainingPatches(samples, config, quiet=True)
        assert all(torch.equal(a, b) for n in range(4) for a, b in zip(expected[n], again[n], strict=True))


# ---- files that mean harm
class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """The file that a harmful one would make; none does."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Evil(path))).close()
    assert path.exists()  # it would
    path.unlink()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors"])
def test_weights_execute_nothing(tmp_path, marker, name):
    torch.save({"conv1.weight": Evil(marker)}, tmp_path / name)
    with pytest.raises(UserError, match=name):
        load_encoder(torch.nn.Conv2d(1, 1, 1), tmp_path / name)
    with pytest.raises(UserError, match=name):
        read_tensors(tmp_path / name)


def test_settings_and_grids_execute_nothing(tmp_path, marker, config, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = f"{{class_path: subprocess.Popen, init_args: {{args: [touch, {marker}]}}}}"
    for value in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/new:subprocess.Popen [[touch, '{marker}']]",
        "!!python/module:evil",
        "!!python/name:evil.Evil",
        "{class_path: evil.Evil}",
        "evil.Evil",
        spec,
    ):
        for text in (
            f"model: {value}",
            f"training: {{epochs: {value}}}",
            f"seed: {value}",
            f"model: {{weights: {value}}}",
        ):
            (tmp_path / "c.yaml").write_text(text)
            (tmp_path / "grid.yaml").write_text(f"baseline: a\nbase: {{{text}}}\narms: {{a: {{seeds: 1}}}}")
            if "weights" in text and value == "evil.Evil":
                assert load_config(tmp_path / "c.yaml").model.weights == value  # a path like any other
                continue
            with pytest.raises(UserError, match=r"c\.yaml"):
                load_config(tmp_path / "c.yaml")
            if not text.startswith("seed"):
                with pytest.raises(UserError, match=r"grid\.yaml"):
                    load_grid(tmp_path)
        assert main(["train", f"--training.epochs={value}"]) == 2
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..\\outside", "/tmp/outside"])
def test_the_arms_of_a_study_stay_in_its_folder(tmp_path, config, name):
    study = tmp_path / "below" / "study"
    study.mkdir(parents=True)
    base = {key: value for key, value in to_dict(config).items() if key != "seed"}
    (study / "grid.yaml").write_text(yaml.safe_dump({"baseline": name, "base": base, "arms": {name: {"seeds": 1}}}))
    with pytest.raises(UserError, match=r"grid\.yaml.*name"):
        run_study(study, quiet=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "grid.yaml", "study"]


def test_pictures_execute_nothing(tmp_path, marker, monkeypatch):
    """Pillow would hand PostScript, whatever the file's name, to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("photo.png", "photo.eps"):
        (tmp_path / name).write_text(postscript)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_a_picture_within_iptc_data_is_not_opened(tmp_path):
    """Pillow opens it as whatever it is, PostScript included."""
    inner = io.BytesIO()
    Image.new("L", (8, 8)).save(inner, "PNG")  # here a harmless one, to see whether it is opened
    fields = {(3, 60): b"\1\0", (3, 20): b"\0\x08", (3, 30): b"\0\x08", (3, 120): b"\5", (8, 10): inner.getvalue()}
    data = b"".join(b"\x1c" + bytes(key) + len(text).to_bytes(2, "big") + text for key, text in fields.items())
    (tmp_path / "photo.png").write_bytes(data)
    assert np.array(Image.open(tmp_path / "photo.png")).shape == (8, 8)  # by Pillow's own choice of formats it is
    with pytest.raises(UserError, match=r"photo\.png"):
        read_image(tmp_path / "photo.png")


def test_cached_images_execute_nothing(tmp_path, marker, config, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 0)
    config.data = write_folder(tmp_path / "set")
    samples = find_samples(config.data)
    expected = TrainingPatches(samples, config, quiet=True)[0][0]
    for path in tmp_path.rglob("*.npy"):
        np.save(path, np.array([Evil(marker)], object), allow_pickle=True)
    assert torch.equal(TrainingPatches(samples, config, quiet=True)[0][0], expected)


def test_a_run_executes_nothing(tmp_path, marker, whole):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((whole / "config.yaml").read_text())
    (run / "metrics.json").write_bytes((whole / "metrics.json").read_bytes())
    torch.save({"stem.conv1.weight": Evil(marker)}, run / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_run(run)
    (run / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    (run / "metrics.json").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError, match=r"metrics\.json"):
        load_run(run)


def test_a_fetched_archive_that_climbs_out_is_not_followed(tmp_path, monkeypatch):
    """kagglehub unpacks; what we copy from its folder lands below `root/DRIVE`, without the links in it."""
    archive, root = tmp_path / "archive", tmp_path / "data"
    write_drive(archive / "DRIVE")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("of somebody else")
    (archive / "DRIVE" / "out").symlink_to(tmp_path / "secret", target_is_directory=True)
    (archive / "DRIVE" / "training" / "key").symlink_to(tmp_path / "secret" / "key")
    stub_kagglehub(monkeypatch, lambda name: str(archive))
    prepare(DataConfig("drive", str(root)), tmp_path / "out", download=True)
    assert not any(path.is_symlink() for path in root.rglob("*"))
    assert not any(path.name in ("key", "out") for path in root.rglob("*"))
    assert [path.name for path in (tmp_path / "secret").iterdir()] == ["key"]
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "data", "out", "secret"}
