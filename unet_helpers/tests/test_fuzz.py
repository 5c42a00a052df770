"""Damaged, hostile and odd files: each is read, or refused in one line that names it.

At least 200 inputs a kind, drawn from fixed seeds; three of four differ from a valid file in one small place.
"""

import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import unicodedata
import zlib
from dataclasses import asdict
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel

from unet_helpers import __main__ as command_line
from unet_helpers import datasets, images, runs, studies
from unet_helpers.catalogue import CAMVID_LABELS, NYUV2_FILE, RITE_COLOURS
from unet_helpers.config import Config, DataConfig, RunError, UserError, check_config, dump_config, load_config
from unet_helpers.datasets import Sample, find_meaning, find_samples, load_sample
from unet_helpers.images import decode_mask, open_image, read_image, read_mask_values
from unet_helpers.model import build_model
from unet_helpers.runs import load_network, load_run, load_state, read_history
from unet_helpers.studies import format_study, load_grid, read_rows, summarise_study

# How many inputs of each kind are tried.
COUNTS = {
    "photographs": 400, "masks": 400, "colour labels": 240, "config.yaml": 300, "grid.yaml": 200, "rows.csv": 200,
    "history.csv": 200, "metrics.json": 200, "model.safetensors": 200, "last.safetensors": 200, "cache": 240,
    "nyuv2": 240, "names": 200, "lists": 240, "arguments": 250,
}  # fmt: skip
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (21, 30, 3), dtype=np.uint8)
MASK = RNG.integers(0, 2, (21, 30), dtype=np.uint8)
HUGE = 100_000  # pixels a side, as a header may claim

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it reads all the same


def refused(work, name: str) -> bool:
    """Whether `work` ends in our own error, which must be one line that names the file; any other error fails."""
    try:
        work()
        return False
    except (UserError, RunError) as error:
        message = re.sub("(?i)new\nline", "", str(error))  # the name of one of the files
    assert "\n" not in message
    assert name in message
    assert len(message) < 2000
    return True


def both(verdicts: list[bool], count: int) -> bool:
    """Whether so many inputs were tried, or more, and some of them refused and some read."""
    return len(verdicts) >= count and set(verdicts) == {True, False}


def change(content: bytes, rng: np.random.Generator, header: int = 64) -> bytes:
    """The content with one small change, half of the time within the first `header` bytes."""
    data, end = bytearray(content), min(header, len(content)) if rng.random() < 0.5 else len(content)
    place, kind = int(rng.integers(end)), rng.integers(7)
    if kind <= 1:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[place] = int(rng.integers(256))
    elif kind == 3:  # a number that is as large, or as negative, as it can be
        data[place : place + 4] = bytes([rng.choice([0x7F, 0xFF]), 0xFF, 0xFF, rng.choice([0x7F, 0xFF])])
    elif kind == 4:
        del data[place : place + int(rng.integers(1, 9))]
    elif kind == 5:
        data[place:place] = rng.bytes(int(rng.integers(1, 9)))
    else:
        del data[len(data) - int(rng.integers(1, max(2, len(data) // 4))) :]
    return bytes(data)


def far_off(content: bytes, rng: np.random.Generator) -> bytes:
    """Something that only begins like the content, or not even that."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.bytes(int(rng.integers(0, 300)))
    if kind == 1:
        return content[: int(rng.integers(len(content)))]
    if kind == 2:
        return content[: int(rng.integers(4, 40))] + rng.bytes(int(rng.integers(300)))
    if kind == 3:
        return b"\x00" * int(rng.integers(1, 300))
    for _ in range(30):
        content = change(content, rng, len(content)) or b"\x00"
    return content


def mutants(content: bytes, count: int, seed: int, header: int = 64):
    """So many damaged versions of a file's content; each fourth is far from it."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield far_off(content, rng) if number % 4 == 3 else change(content, rng, header)


def common(a: bytes, b: bytes) -> int:
    """Length of the beginning that two have in common."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_three_of_four_inputs_are_nearly_valid():
    whole = PHOTO.tobytes()
    for number, content in enumerate(mutants(whole, 400, 0)):
        start, end = (common(a, b) for a, b in ((whole, content), (whole[::-1], content[::-1])))
        near = start + end >= len(whole) - 8 or (content == whole[: len(content)] and len(content) >= len(whole) * 0.7)
        assert near or number % 4 == 3


# ---- pictures
def encoded(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def deep(array: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, array)[1].tobytes()


def tiled(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, tile=(16, 16), compression="zlib", photometric="rgb")
    return buffer.getvalue()


def photographs() -> dict[str, bytes]:
    colour, wide = Image.fromarray(PHOTO), PHOTO.astype(np.uint16) * 200
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a.png": encoded(colour, "PNG"),
        "palette.png": encoded(colour.quantize(), "PNG"),
        "deep.png": deep(wide, ".png"),
        "a.jpg": encoded(colour, "JPEG", exif=exif),
        "a.tif": encoded(colour, "TIFF"),
        "tiled.tif": tiled(PHOTO),
        "packed.tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "deep.tif": deep(wide, ".tif"),
        "a.gif": encoded(colour, "GIF"),
        "a.bmp": encoded(colour, "BMP"),
        "a.webp": encoded(colour, "WEBP"),
    }


def masks() -> dict[str, bytes]:
    grey, index = Image.fromarray(MASK * 255), Image.fromarray(MASK).convert("P")
    index.putpalette([4, 2, 4, 252, 254, 252])
    return {
        "grey.png": encoded(grey, "PNG"),
        "index.png": encoded(index, "PNG"),
        "bit.png": encoded(grey.convert("1"), "PNG"),
        "deep.png": deep(MASK.astype(np.uint16), ".png"),
        "colour.png": encoded(grey.convert("RGB"), "PNG"),
        "a.gif": encoded(grey, "GIF"),
        "a.tif": encoded(Image.fromarray(MASK), "TIFF"),
        "a.bmp": encoded(grey, "BMP"),
    }


@pytest.mark.parametrize("name", photographs())
def test_photographs(tmp_path, name, monkeypatch):
    """By the reader that training has, and by that of predictions, for which here every tiled TIFF is a large one."""
    monkeypatch.setattr(images, "LARGE", 100)
    path, content, verdicts = tmp_path / name, photographs()[name], []

    def look(read):
        image = read(path)
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.dtype == np.uint8 or (image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1)

    for damaged in mutants(content, COUNTS["photographs"] // len(photographs()), 1):
        path.write_bytes(damaged)
        verdicts += [refused(lambda read=read: look(read), name) for read in (read_image, open_image)]
    path.write_bytes(content)
    assert not refused(lambda: look(read_image), name)
    assert not refused(lambda: look(open_image), name)
    assert len(verdicts) >= 2 * (COUNTS["photographs"] // len(photographs()))
    assert True in verdicts[::2]
    assert True in verdicts[1::2]


@pytest.mark.parametrize("name", masks())
def test_masks(tmp_path, name):
    path, content, verdicts = tmp_path / name, masks()[name], []
    for damaged in mutants(content, COUNTS["masks"] // len(masks()), 2):
        path.write_bytes(damaged)

        def look():
            values = read_mask_values(path)
            assert values.ndim == 2
            assert values.dtype in (np.uint8, np.uint16)
            mask = decode_mask(values, find_meaning([path]))
            assert mask.dtype == np.uint8

        verdicts.append(refused(look, name))
    assert both(verdicts, COUNTS["masks"] // len(masks()))


@pytest.mark.parametrize("name", ["rite.png", "camvid.png"])
def test_colour_labels(tmp_path, name):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 255, 0]], np.uint8)
    picture = colours[RNG.integers(0, 5, (21, 30))] if name == "rite.png" else RNG.integers(0, 12, (21, 30), np.uint8)
    content, verdicts = encoded(Image.fromarray(picture), "PNG", compress_level=0), []
    photo, path = tmp_path / "photo.png", tmp_path / name
    Image.fromarray(PHOTO).save(photo)
    meaning = RITE_COLOURS if name == "rite.png" else CAMVID_LABELS
    sample = Sample("a", str(photo), str(path), None, "a", "train", meaning)
    rng = np.random.default_rng(3)
    for number, damaged in enumerate(mutants(content, COUNTS["colour labels"] // 2, 3)):
        if number % 3 == 0:  # a sound file in which one pixel has another value
            changed = picture.copy()
            changed[rng.integers(21), rng.integers(30)] = rng.integers(0, 256, picture.shape[2:])
            damaged = encoded(Image.fromarray(changed), "PNG")
        path.write_bytes(damaged)

        def look():
            assert set(np.unique(load_sample(sample)[1])) <= {*meaning.values()}

        verdicts.append(refused(look, name))
    assert both(verdicts, COUNTS["colour labels"] // 2)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff_of_size(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\x00" + struct.pack("<IH", 8, len(tags)) + entries).ljust(300, b"\x00")


def test_pictures_that_claim_to_be_huge(tmp_path):
    bmp = bytearray(encoded(Image.fromarray(PHOTO), "BMP"))
    bmp[18:26] = struct.pack("<ii", HUGE, HUGE)
    gif = bytearray(encoded(Image.fromarray(MASK), "GIF"))
    gif[6:10] = b"\xff" * 4
    jpeg = encoded(Image.fromarray(PHOTO), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:start] + b"\xff" * 4 + jpeg[start + 4 :]
    files = {"a.png": png_of_size(HUGE, HUGE), "a.tif": tiff_of_size(HUGE, HUGE), "a.bmp": bytes(bmp), "a.jpg": jpeg}
    files |= {"a.gif": bytes(gif), "wide.png": png_of_size(2**31 - 1, 1), "flat.tif": tiff_of_size(2**32 - 1, 1)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert refused(lambda name=name: read_image(tmp_path / name), name)
        assert refused(lambda name=name: read_mask_values(tmp_path / name), name)


# ---- settings
VALUES = (
    """
''|null|~|.nan|.inf|-.inf|1e400|1e308|1.5|-1|0|-0.0|99999999999999999999999|yes|True|three|[]|{}|[1, 2]|[[1], [2]]
[1, a]|{a: 1}|{1: 2}|[null]|2020-13-45|2020-01-01|2020-01-01 99:00:00|!!python/object/apply:os.system ['true']
!!python/name:os.system|!!python/module:os|!!binary x|!!int ''|!!int x|!!bool maybe|!!float x|!!timestamp x|!!set {a}
!!omap [a: 1]|!!pairs [a]|!!str 3|!!null 3|!unknown 3|&a [*a]|*b|'"'|"\\ud800"|"\\0"|"\\n"|é|0x|0x1F|0o9|0b2|1_000|.
-||> x|? x|<<: 3|'a b'|"it's"|%x|@x|`x|{class_path: os.system}|{class_path: subprocess.Popen, init_args: {args: [true]}}
/etc/passwd|../../etc/passwd|-5|[16, 32|16, 32]|"unclosed|[1e999]|!!python/tuple [1, 2]|{__path__: x}|{'': 1}|{a.b: 1}
""".strip()
    .replace("\n", "|")
    .split("|")
)
DEEP, BOMB = "[" * 500, "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))


def hostile_yaml(text: str) -> list[bytes]:
    """What nests too deeply, unfolds to too much, or would run something."""
    texts = [
        DEEP, f"x: {DEEP}", "a0: &a0 [x, x]\n" + BOMB, f"{text}\na0: &a0 [x, x]\n{BOMB}", "9" * 5000,
        f"seed: {'9' * 5000}", "&a [*a]", "a: &a\n  b: *a", "{" * 500, "- " * 400 + "x", "? " * 400 + "x",
        "!!python/object/new:os.system [true]", "a0: &a0 {x: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}"),
        "data: &a\n  root: *a",
    ]  # fmt: skip
    return [text.encode() for text in texts]


def changed_yaml(text: str, count: int, seed: int):
    """YAML texts with one line changed; each fourth is damaged as any file may be."""
    rng, lines = np.random.default_rng(seed), text.splitlines()
    rough, values = mutants(text.encode(), count, seed), itertools.cycle(VALUES)
    for number in range(count):
        if number % 4 == 3:
            yield next(rough)
            continue
        place, kind, new = int(rng.integers(len(lines))), rng.integers(8), list(lines)
        key, colon, _ = new[place].partition(":")
        if kind <= 4:
            new[place] = f"{key}{colon} {next(values)}" if colon else f"{key[:4]}{next(values)}"
        elif kind == 5:
            new.insert(place, lines[int(rng.integers(len(lines)))])
        elif kind == 6:
            new[place] = " " * int(rng.integers(5)) + new[place].strip()
        else:
            new[place] = rng.choice(["é", "A", "_", ".", "x"]) + new[place]
        yield "\n".join(new).encode()


def test_settings(tmp_path):
    path, verdicts, text = tmp_path / "my.yaml", [], dump_config(Config())
    hostile = hostile_yaml(text)
    for content in [*hostile, *changed_yaml(text, COUNTS["config.yaml"], 4)]:
        path.write_bytes(content)

        def look():
            config = load_config(path)
            check_config(config)
            json.dumps(asdict(config), allow_nan=False)  # no setting is left that JSON cannot hold

        verdicts.append(refused(look, "my.yaml"))
    assert all(verdicts[: len(hostile)])
    assert both(verdicts, COUNTS["config.yaml"])


@pytest.mark.parametrize(
    "text", ["a0: &a0 [x, x]\n" + BOMB, "a0: &a0 {x: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}")]
)
@pytest.mark.parametrize("name", ["my.yaml", "grid.yaml"])
def test_a_few_lines_of_yaml_that_unfold_to_gigabytes(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}.*unfold"):
        load_config(tmp_path / name) if name == "my.yaml" else load_grid(tmp_path)


def test_a_setting_given_twice_is_named(tmp_path):
    (tmp_path / "my.yaml").write_text("training:\n  epochs: 3\n  batch_size: 2\n  epochs: 4\n")
    with pytest.raises(UserError, match=r"my\.yaml: .*key epochs is given twice"):
        load_config(tmp_path / "my.yaml")
    (tmp_path / "grid.yaml").write_text("baseline: a\narms:\n  a: {seeds: 1}\n  a: {seeds: 2}\n")
    with pytest.raises(UserError, match=r"grid\.yaml: .*key a .*twice"):
        load_grid(tmp_path)


GRID = """
baseline: plain
base:
  data: {name: sample, sample_size: 64}
  training: {epochs: 1}
arms:
  plain: &plain {seeds: 2}
  wide:
    <<: *plain
    model.widths: [6, 12]
    starts_from: plain
""".strip()


def test_grids_of_studies(tmp_path):
    verdicts, hostile = [], hostile_yaml(GRID)
    for content in [*hostile, *changed_yaml(GRID, COUNTS["grid.yaml"], 5)]:
        (tmp_path / "grid.yaml").write_bytes(content)

        def look():
            arms, baseline = load_grid(tmp_path)
            assert baseline in arms
            assert all(len(set(arm.seeds)) >= 1 for arm in arms.values())
            format_study(summarise_study(read_rows(tmp_path, arms), arms, baseline))

        verdicts.append(refused(look, "grid.yaml"))
    assert all(verdicts[: len(hostile)])
    assert both(verdicts, COUNTS["grid.yaml"])


# ---- tables and JSON
CELLS = [
    "", " ", "null", "nan", "inf", "-inf", "-1", "0.5", "1e999", "9" * 5000, "text", "é", "\x00", '"', '""', "'", ",",
    "\n", "[", "[]", "{}", "[[]]", "[1]", '{"a": 1}', '{"a": [1, 2, 3, 4]}', '{"a": []}', '{"a": [1, 2, 3]}',
    '{"a": [1, "x", 3, 4]}', "true", "[" * 3000, '"x"', "1;2", "=1+1", "\ufeff", "NaN", "Infinity",
]  # fmt: skip


def changed_table(text: str, count: int, seed: int):
    """CSV texts with one cell, name of a column, or row changed; each fourth is damaged as any file may be."""
    rng, rough = np.random.default_rng(seed), mutants(text.encode(), count, seed, header=120)
    rows, cells = list(csv.reader(io.StringIO(text))), itertools.cycle(CELLS)
    for number in range(count):
        if number % 4 == 3:
            yield next(rough)
            continue
        new, kind = [list(row) for row in rows], rng.integers(6)
        row, column = int(rng.integers(len(rows))), int(rng.integers(len(rows[0])))
        if kind <= 2:
            new[max(row, 1)][column] = next(cells)
        elif kind == 3:
            new[0][column] = str(rng.choice(["", "x", "epoch", "val dice", "seed", "arm"]))
        elif kind == 4:
            new[row] = new[row] + ["1"] if rng.random() < 0.5 else new[row][:column]
        else:
            new.insert(row, new[int(rng.integers(len(new)))])
        table = io.StringIO()
        csv.writer(table, lineterminator="\n", quoting=int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))).writerows(
            new
        )
        raw = table.getvalue()
        yield (raw.replace('"', "") if rng.random() < 0.1 else raw).encode()


def test_histories(tmp_path, trained_run):
    verdicts = []
    for content in changed_table((trained_run / "history.csv").read_text(), COUNTS["history.csv"], 6):
        (tmp_path / "history.csv").write_bytes(content)

        def look():
            for row in read_history(tmp_path / "history.csv"):
                assert all(value is None or type(value) in (int, float) for value in row.values())
                assert set(row) >= {"epoch", "val_dice", "train_loss", "val_loss"}

        verdicts.append(refused(look, "history.csv"))
    assert both(verdicts, COUNTS["history.csv"])


def test_lists_of_images(tmp_path):
    """Nothing outside the list's folder is opened, whatever the list says, though there is a picture to be had."""
    (tmp_path / "set").mkdir()
    for stem in ("a", "b", "c", "../secret"):
        (tmp_path / "set" / f"{stem}.png").write_bytes(encoded(Image.fromarray(PHOTO), "PNG"))
        (tmp_path / "set" / f"{stem}_mask.png").write_bytes(encoded(Image.fromarray(MASK * 255), "PNG"))
    rows = ["image,mask,field_of_view,group,split", "a.png,a_mask.png,,one,train", "b.png,b_mask.png,,two,val"]
    text = "\n".join([*rows, "c.png,c_mask.png,,three,test", ""])
    table, verdicts, half = tmp_path / "set" / "pairs.csv", [], COUNTS["lists"] // 2
    outside = ["../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png", "..\\secret.png", "/etc/passwd"]
    climbing = [text.replace(cell, name, 1).encode() for cell in ("a.png", "c_mask.png") for name in outside]
    damaged = [*mutants(text.encode(), half, 16, len(text)), *changed_table(text, half, 17)]
    for content in climbing + damaged:
        table.write_bytes(content)

        def look():
            for sample in find_samples(DataConfig("folder", str(tmp_path / "set"), val_share=0, test_share=0)):
                assert Path(sample.image).resolve().is_relative_to(table.parent)
                assert Path(sample.mask).resolve().is_relative_to(table.parent)
                load_sample(sample)

        verdicts.append(refused(look, "pairs.csv"))
    assert all(verdicts[: len(climbing)])
    assert both(verdicts, COUNTS["lists"])


def test_rows_of_studies(tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(GRID)
    arms, baseline = load_grid(tmp_path)
    prints = {(arm, seed): studies.settings_of(arms, arms[arm], seed) for arm in arms for seed in (0, 1)}
    monkeypatch.setattr(studies, "settings_of", lambda arms, arm, seed: prints.get((arm.name, seed), {}))
    numbers = {"val_dice": 0.7, "train_dice": 0.8, "best_epoch": 1, "parameters": 9, "seconds": 1.5, "device": "CPU, 1"}
    curves = {f"{name}_curve": [None, 0.5] for name in ("val_dice", "train_loss", "val_loss")}
    rest = {**numbers, **curves, "counts": {"a": [5, 1, 2, 9], "b": [3, 3, 1, 9]}}
    rows = [{"arm": arm, "seed": seed, "settings": prints[arm, seed], **rest} for arm in arms for seed in (0, 1)]
    studies.write_rows(tmp_path, rows)
    assert read_rows(tmp_path, arms) == rows
    verdicts = []
    for content in changed_table((tmp_path / "rows.csv").read_text(), COUNTS["rows.csv"], 7):
        (tmp_path / "rows.csv").write_bytes(content)
        verdicts.append(
            refused(lambda: format_study(summarise_study(read_rows(tmp_path, arms), arms, baseline)), "rows.csv")
        )
    assert both(verdicts, COUNTS["rows.csv"])


@pytest.mark.parametrize("classes", [1, 3])
def test_metrics_of_runs(tmp_path, trained_run, monkeypatch, classes):
    config = load_config(trained_run / "config.yaml")
    config.model.num_classes = classes
    monkeypatch.setattr(runs, "load_config", lambda path: config)
    monkeypatch.setattr(runs, "load_network", lambda run, config: torch.nn.Identity())
    for name in ("config.yaml", "model.safetensors"):
        shutil.copy(trained_run / name, tmp_path)
    metrics = json.loads((trained_run / "metrics.json").read_text())
    metrics["threshold"] = metrics["threshold"] if classes == 1 else None
    text, rng, verdicts, count = (
        json.dumps(metrics, indent=2),
        np.random.default_rng(8),
        [],
        COUNTS["metrics.json"] // 2,
    )
    others = [None, True, False, "0.5", "x", [], {}, [0.5], {"a": 1}, -0.1, 1.1, math.nan, math.inf, 0, 1, 0.5, 10**400]
    hostile = [b"[" * 100_000, b'{"threshold": ' * 9000, b"\xff\xfe", b"[]", b"null"]
    damaged = list(mutants(text.encode(), count, 8, header=40))
    for number in range(count):
        if number % 4 < 2:
            changed = metrics | {str(rng.choice(["threshold", "reads", *metrics])): others[number // 2 % len(others)]}
            damaged[number] = json.dumps(changed).encode()
    for content in hostile + damaged:
        (tmp_path / "metrics.json").write_bytes(content)

        def look():
            opened = load_run(tmp_path)
            assert opened.threshold is None if classes > 1 else 0 <= opened.threshold <= 1
            assert isinstance(opened.metrics, dict)
            dict(opened.metrics.get("reads", {}))  # as `evaluate --save` does

        verdicts.append(refused(look, "metrics.json"))
    assert all(verdicts[: len(hostile)])
    assert both(verdicts, count)


# ---- weights
def changed_tensors(content: bytes, count: int, seed: int):
    """Safetensors whose JSON header is changed in one place, and as any file may be damaged."""
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names, rng = [name for name in header if name != "__metadata__"], np.random.default_rng(seed)
    rough = mutants(content, count, seed, header=length)
    for number in range(count):
        if number % 2:
            yield next(rough)
            continue
        new, name, kind = json.loads(json.dumps(header)), str(rng.choice(names)), number // 2 % 10
        if kind == 0:
            new[name]["dtype"] = str(rng.choice(["F16", "I64", "I32", "BOOL", "F8_E4M3", "C64", "X", ""]))
        elif kind == 1:
            new[name]["shape"] = [[], [0], [2**62, 2**62], [-1], [1] * 70, ["a"], [1.5], None][int(rng.integers(8))]
        elif kind == 2:
            new[name]["shape"] = new[name]["shape"][::-1] + [1] * int(rng.integers(2))
        elif kind == 3:
            new[name]["data_offsets"] = [[0, 2**50], [5, 2], [0], None, [-1, 4], [2**64, 2**65]][int(rng.integers(6))]
        elif kind == 4:
            del new[name]
        elif kind == 5:
            new[f"x{name}"] = new.pop(name)
        elif kind == 6:
            other = str(rng.choice(names))
            new[name], new[other] = new[other], new[name]
        elif kind == 7:
            new["__metadata__"] = [{"progress": "{}", "scaler": "{}"}, {"progress": 1}, [], None, {}][
                int(rng.integers(5))
            ]
        elif kind == 8 and "progress" in new.get("__metadata__", {}):
            progress = json.loads(new["__metadata__"]["progress"])
            changes = (
                {"epoch": "two"},
                {"epoch": -1},
                {"epoch": 99},
                {"best_epoch": 7},
                {"best_epoch": 1.5},
                {"history": 3},
            )
            changes += (
                {"history": []},
                {"history": [{}]},
                {"extra": 1},
                {"history": [{**progress["history"][0], "step": "x"}]},
            )
            new["__metadata__"]["progress"] = json.dumps(progress | changes[int(rng.integers(10))])
        else:
            body = bytes(len(body))  # from here on all numbers are 0
        text = json.dumps(new).encode()
        claimed = [2**40, 2**63, 0, len(text) + 7][number // 14 % 4] if number % 14 == 0 else len(text)
        yield struct.pack("<Q", claimed) + text + body


def test_weights(tmp_path, trained_run):
    config = load_config(trained_run / "config.yaml")
    whole, verdicts = (trained_run / "model.safetensors").read_bytes(), []
    for content in changed_tensors(whole, COUNTS["model.safetensors"], 9):
        (tmp_path / "model.safetensors").write_bytes(content)

        def look():
            with torch.no_grad():
                assert load_network(tmp_path, config)(torch.zeros(1, 3, 8, 8)).shape == (1, 1, 8, 8)

        verdicts.append(refused(look, "model.safetensors"))
    assert both(verdicts, COUNTS["model.safetensors"])


def test_states_of_interrupted_runs(tmp_path, trained_run):
    """What is accepted can be trained on: the progress makes sense, and the optimiser does a step."""
    config = load_config(trained_run / "config.yaml")
    whole, verdicts = (trained_run / "state" / "last.safetensors").read_bytes(), []
    (tmp_path / "state").mkdir()
    network = build_model(config.model)
    average = AveragedModel(network, use_buffers=True)
    for content in changed_tensors(whole, COUNTS["last.safetensors"], 10):
        (tmp_path / "state" / "last.safetensors").write_bytes(content)

        def look():
            optimiser = torch.optim.AdamW(network.parameters())
            progress = load_state(tmp_path, network, average, optimiser, None)
            assert progress.epoch in (0, 1, 2)
            assert progress.best_epoch <= progress.epoch == len(progress.history) - 1
            progress.line(config.training.epochs)
            network(torch.zeros(1, 3, 8, 8)).sum().backward()
            optimiser.step()

        verdicts.append(refused(look, "last.safetensors"))
    assert both(verdicts, COUNTS["last.safetensors"])


# ---- cached images and NYUv2
def test_cached_images(tmp_path, monkeypatch):
    """Whatever lies in the cache, the arrays fit together, and the image is decoded anew where they would not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 0)
    for name, array in (("photo.png", PHOTO), ("mask.png", MASK)):
        Image.fromarray(array).save(tmp_path / name)
    sample = Sample("a", str(tmp_path / "photo.png"), str(tmp_path / "mask.png"), None, "a", "train")
    config = Config(data=DataConfig("folder", str(tmp_path)))
    expected = [np.array(part) for part in datasets.Decoded([sample], config)[0]]
    (path,) = tmp_path.glob("cache/unet_helpers/*/*.npy")
    whole, read = path.read_bytes(), 0
    length = 10 + struct.unpack("<H", whole[8:10])[0]
    rng, header = np.random.default_rng(11), whole[10:length].decode()
    swaps = [
        ("'<f4'", "'|O'"),
        ("'<f4'", "'<f8'"),
        ("(21, 30, 3)", "(30, 21, 3)"),
        ("(21, 30, 3)", "(1890,)"),
        ("|u1", "|i1"),
    ]
    swaps += [("(),", "(2,),"), ("(),", "(-1,),"), ("()", "(9999999999999,)"), ("'mask'", "'image'"), ("False", "True")]
    swaps += [
        ("{", "{[]: 1, "),
        ("{", "[" * 200),
        ("'descr'", "'x'"),
        ("'view'", "'vieW'"),
        ("(3,)", "(1,)"),
        ("<U64", "<U63"),
    ]
    for number, content in enumerate(mutants(whole, COUNTS["cache"], 11, header=length)):
        if number % 2:
            old, new = swaps[number // 2 % len(swaps)]
            content = whole[:10] + header.replace(old, new, int(rng.integers(1, 3))).encode()[: length - 10].ljust(
                length - 10
            )
            content += whole[length:]
        path.write_bytes(content)
        item = datasets.Decoded([sample], config)[0]
        assert [part.shape for part in item] == [part.shape for part in expected]
        assert [part.dtype for part in item] == [part.dtype for part in expected]
        read += isinstance(item[0], np.memmap)
    assert 0 < read < COUNTS["cache"]


def write_nyuv2(path: Path, change: str = "") -> None:
    """The official file's structure with two small images; `change` says what is wrong with it."""
    images, labels = RNG.integers(0, 256, (2, 3, 6, 5), dtype=np.uint8), RNG.integers(0, 895, (2, 6, 5)).astype("u2")
    with h5py.File(path, "w") as file:
        names = [file.create_dataset(f"#refs#/{n}", data=np.array([[107], [48 + n]], "u2")) for n in range(2)]
        scenes = np.array([[name.ref for name in names]], dtype=h5py.ref_dtype)
        parts = {"images": images, "labels": labels, "scenes": scenes}
        part, _, how = change.partition(" ")
        if how == "missing":
            del parts[part]
        elif how == "group":
            parts[part] = None
        elif how == "short":
            parts[part] = parts[part][:1] if part != "scenes" else scenes[:, :1]
        elif how == "empty":
            parts[part] = parts[part][:0]
        elif how == "flat":
            parts[part] = parts[part].reshape(-1)
        elif how == "turned":
            parts[part] = parts[part].T
        elif how == "texts":
            parts[part] = np.array([b"abc", b"d"])
        elif how == "numbers":
            parts[part] = parts[part].astype("f4") if part != "scenes" else np.ones((1, 2))
        elif how == "negative":
            parts[part] = -np.ones(parts[part].shape, "i4")
        elif how == "large":
            parts[part] = np.full(parts[part].shape, 60_000, "u2")
        elif how == "unset":
            parts[part] = np.full((1, 2), h5py.Reference(), dtype=h5py.ref_dtype)
        elif how == "elsewhere":
            file[part] = h5py.ExternalLink("/etc/passwd", "/x") if part != "labels" else h5py.SoftLink("/nowhere")
            del parts[part]
        for name, array in parts.items():
            file.create_group(name) if array is None else file.create_dataset(name, data=array)
        if how == "odd letters":
            del file["#refs#/0"]
            file["#refs#/0"] = [[-5.5], [1e30]]
            file["scenes"][0, 0] = file["#refs#/0"].ref


CHANGES = [
    f"{part} {how}"
    for part in ("images", "labels", "scenes")
    for how in (
        "missing",
        "group",
        "short",
        "empty",
        "flat",
        "turned",
        "texts",
        "numbers",
        "negative",
        "large",
        "elsewhere",
    )
] + ["scenes unset", "scenes odd letters"]


def test_nyuv2_files(tmp_path):
    path, verdicts = tmp_path / NYUV2_FILE, []
    config = DataConfig("nyuv2-13", str(tmp_path), val_share=0.0)
    write_nyuv2(path)
    whole = path.read_bytes()

    def look():
        for sample in find_samples(config):
            image, mask = load_sample(sample)
            assert image.shape == (*mask.shape, 3)
            assert image.dtype == mask.dtype == np.uint8

    assert not refused(look, NYUV2_FILE)
    for number, content in enumerate(mutants(whole, COUNTS["nyuv2"], 12, header=2000)):
        if number % 4 == 0:
            write_nyuv2(path, CHANGES[number // 4 % len(CHANGES)])
        else:
            path.write_bytes(content)
        verdicts.append(refused(look, NYUV2_FILE))
    assert both(verdicts, COUNTS["nyuv2"])


# ---- names of files, and command lines
NAMES = [
    "with space", " leading", "trailing ", "it's", 'say "hi"', "back\\slash", "new\nline", "tab\tin", "semi;colon",
    "$HOME", "%s", "{0}", "*", "?", "[a]", "~", "-rf", "--help", "a.b.c", "..a", "__init__", "_", "-", "0", "é" * 40,
    "\U0001f600", "\uff26\uff35\uff2c\uff2c", "ß", "İ", "日本", unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"), "\u202eabc", "a\u200bb", "a" * 240,
    "mask", "image", "mask_image", "b'x'", "\x1b[31m", "\x07", "CON", "a:b",
    "a|b", "#", os.fsdecode(b"not utf8 \xff"), "&", "sample:vessels:64:train:0",
]  # fmt: skip


def test_names(tmp_path):
    """Three plainly named images and one oddly named, in various layouts; some clash in case, some are no files."""
    photo, mask = encoded(Image.fromarray(PHOTO), "PNG"), encoded(Image.fromarray(MASK * 255), "PNG")
    rng, verdicts, loaded = np.random.default_rng(18), [], 0
    layouts = (("images", "masks"), ("a", "a_masks"), ("train/image", "train/mask"), ("", ""))
    for number in range(COUNTS["names"]):
        root, name, other = tmp_path / f"set{number}", NAMES[number % len(NAMES)], ""
        images, masks = layouts[(number + number // len(NAMES)) % 4]  # each name in each of them
        suffix, kind, way = "" if masks else "_mask", rng.integers(5), int(rng.integers(6))
        for folder in (images, masks):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if kind == 1:
            other = name.swapcase()
        elif kind == 2:  # the mask's name is written in another way
            other = unicodedata.normalize("NFD", name)
        for stem, theirs in [("one", ""), ("two", ""), ("three", ""), (name, other if kind == 2 else "")]:
            (root / images / f"{stem}.png").write_bytes(photo)
            (root / masks / f"{theirs or stem}{suffix}.png").write_bytes(mask)
        if kind == 1:
            (root / images / f"{other}.png").write_bytes(photo)
            (root / masks / f"{other}{suffix}.PNG").write_bytes(mask)
        elif kind == 3:
            (root / masks / f"{name}{suffix}.png").unlink()
            (root / masks / f"{name}{suffix}.png").symlink_to([f"{name}{suffix}.png", "/etc/passwd", ".."][way % 3])
        elif kind == 4:
            (root / images / f"{name}.png").unlink()
            (root / images / f"{name}.png").mkdir() if way % 2 else os.mkfifo(root / images / f"{name}.png")

        def look(root=root):
            for sample in find_samples(DataConfig("folder", str(root))):
                assert load_sample(sample)[0].shape == PHOTO.shape

        verdicts.append(refused(look, root.name))
        loaded += not verdicts[-1]
    assert loaded > COUNTS["names"] / 3


LINES = [
    "train --run new --training.epochs 3 --model.widths [4,8] --data.name drive --augmentation.flips horizontal",
    "train --resume run --training.workers 1",
    "train --config my.yaml --seed 4 --training.class_weights [1,2] --data.val_share 0.5",
    "prepare folder --data-root data --output out --data.mask_values classes --no-download",
    "evaluate run --data drive --split val --no-flips --json --device cpu",
    "predict run a.png b.png --output out --gif",
    "benchmark --size [40,50] --steps 2 --training.batch_size 4",
    "study study --arms a b",
]
WORDS = [
    "", "-", "--", "---", "--=", "--config", "--config=",
    "--config=none.yaml", "--config=.", "--resume", "--resume=", "-h", "--help", "--print_config", "--print_config=x",
    "--training", "--training=my.yaml", "--training.", "--.", "--training.epochs", "--training.epochs=",
    "--training.epochs=x", "--training.epochs=[1]", "--training.epochs={a: 1}", "--training.epochs=&a [*a]",
    f"--training.epochs={DEEP}", f"--training.epochs={'9' * 5000}", "--training.epochs=2020-13-45",
    "--training.epochs=!!int ''", "--training.learning_rate=nan", "--training.learning_rate=inf",
    "--training.class_weights=[1,a]", "--augmentation.flips=maybe", "--augmentation.patch_size=a",
    "--augmentation.scale=[1]", "--model.widths=[4,", "--model.widths=4", "--model.widths+=4",
    "--model={class_path: os.system}", "--model.class_path=os.system", "--data={name: drive}", "--data.root=",
    "--data.longest_side=x", "--data.name=x", "--seed=null", "--seed=-1", "--seed=1e99", "--seed", "null", "[", "{",
    "é", "a b", "'", '"', "\n", "@my.yaml", "%s", "%(prog)s", "{0}", "\\", "~", "*", "--no-flips=1", "--json=1",
    "--size=[1,2", "--size=[0,0]", "--steps=x", "--steps=0", "--split=train", "--data=x", "--device=tpu", "9" * 5000,
    "-1", "--run=", "--run=x", "tain", "--Training.epochs=3", "--training.epoch=3", "--training.epochs 3", "my.yaml",
]  # fmt: skip


def test_command_lines(tmp_path, trained_run, monkeypatch, capsys):
    def parsed(args):
        """Nothing: only the parsing of the command line is tried."""

    monkeypatch.setattr(command_line, "COMMANDS", dict.fromkeys(command_line.COMMANDS, parsed))
    monkeypatch.setattr(command_line, "make_parsers", functools.cache(command_line.make_parsers))  # a tenth of a second
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(dump_config(Config()))
    shutil.copytree(trained_run, "run")
    rng, codes, odd, odd_ones = np.random.default_rng(13), [], "", itertools.cycle(WORDS)
    for number, base in zip(range(COUNTS["arguments"]), itertools.cycle(LINES), strict=False):
        words = base.split(" ")
        place = int(rng.integers(1, len(words) + 1))
        if number % 5 < 4:  # each fifth stays as it is: 200 odd ones, and 50 that must be understood
            odd = next(odd_ones)
            words[place : place + (number % 3 == 0)] = [odd]  # put in, or in another's place
        if number % 8 == 7 and number % 5 < 4:
            del words[int(rng.integers(len(words)))]
        try:
            codes.append(command_line.main(words))
        except SystemExit as stop:  # after --help and --print_config
            codes.append(stop.code or 0)
        captured = capsys.readouterr()
        assert codes[-1] in (0, 2)
        if codes[-1] == 2:
            assert captured.err.startswith("error: ")
            assert captured.err.count("\n") == 1
            for leak in ("Parser key", "<class", "typing.", "Union", "Traceback", "class_path"):
                assert leak not in captured.err.split(odd or "\0")[0], captured.err
    assert len(codes) >= COUNTS["arguments"]
    assert codes.count(0) > COUNTS["arguments"] / 5
    assert codes.count(2) > COUNTS["arguments"] / 5
