import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image

from unet_helpers import images
from unet_helpers.catalogue import find_drive
from unet_helpers.config import UserError
from unet_helpers.images import (
    Colours,
    decode_mask,
    field_of_view,
    find_palette,
    list_images,
    mask_meaning,
    normalise,
    open_image,
    read_image,
    read_mask_values,
    shrink,
    statistics_inside,
    survey_mask,
)
from unet_helpers.sample_data import make_retina
from unet_helpers.system import let_go, on_disk

REAL_DATA = os.environ.get("UNET_DATA_ROOT", "data")
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
MASK = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "webp"])
def test_colour_files_come_out_as_they_went_in(tmp_path, ending):
    path = save(tmp_path / f"a.{ending}", COLOUR, **({"lossless": True} if ending == "webp" else {}))
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLOUR)


def test_grey_palette_and_alpha_become_three_channels(tmp_path):
    grey = save(tmp_path / "grey.png", COLOUR[..., 0])
    np.testing.assert_array_equal(read_image(grey), np.repeat(COLOUR[..., :1], 3, axis=2))
    palette = Image.fromarray(MASK).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "palette.gif")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.gif"), np.array([[10, 20, 30], [200, 100, 50]])[MASK])
    alpha = save(tmp_path / "alpha.png", np.dstack([COLOUR, np.zeros((7, 5), np.uint8)]))
    np.testing.assert_array_equal(read_image(alpha), COLOUR)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_12_bit_camera_in_a_16_bit_grey_file_fills_the_range(tmp_path, ending):
    values = np.array([[100, 1124], [2148, 4196]], np.uint16)
    image = read_image(save(tmp_path / f"deep.{ending}", values))
    assert image.dtype == np.float32
    assert image.shape == (2, 2, 3)
    np.testing.assert_allclose(image[..., 1], [[0, 0.25], [0.5, 1]])


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_colour_keeps_its_lower_bits_and_the_order_of_channels(tmp_path, ending):
    values = RNG.integers(0, 4096, (6, 4, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"deep.{ending}"), values[..., ::-1])
    expected = (values - values.min()) / np.ptp(values).astype(float)
    np.testing.assert_allclose(read_image(tmp_path / f"deep.{ending}"), expected, atol=1e-6)
    opaque = np.full((6, 4, 1), 65535, np.uint16)
    cv2.imwrite(str(tmp_path / f"clear.{ending}"), np.concatenate([values[..., ::-1], opaque], -1))
    np.testing.assert_allclose(read_image(tmp_path / f"clear.{ending}"), expected, atol=1e-6)


def test_float_file_with_nan_is_finite(tmp_path):
    image = read_image(save(tmp_path / "f.tif", np.array([[np.nan, -5.0], [0.0, 5.0]], np.float32)))
    np.testing.assert_allclose(image[..., 0], [[0, 0], [0.5, 1]])


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    path = save(tmp_path / "turned.png", COLOUR, exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(COLOUR, -1))


@pytest.mark.parametrize("turned", range(1, 9))
def test_exif_orientation_is_followed_in_pictures_of_16_bits_too(tmp_path, turned):
    values = RNG.integers(0, 2**16, (6, 4, 3)).astype(np.uint16)
    values[0, :2, 0] = 0, 2**16 - 1  # the whole range, as deep pictures are stretched to it
    cv2.imwrite(str(tmp_path / "deep.png"), values[..., ::-1])
    exif = Image.Exif()
    exif[0x0112] = turned
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    plain = (tmp_path / "deep.png").read_bytes()
    start = 8 + 25  # behind the signature and IHDR
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "turned.png").write_bytes(plain[:start] + framed + plain[start:])
    image = read_image(tmp_path / "turned.png")
    assert image.dtype == np.float32  # nothing of the 16 bits is lost
    save(tmp_path / "shallow.png", (values >> 8).astype(np.uint8), exif=exif)
    np.testing.assert_allclose(image, read_image(tmp_path / "shallow.png") / 255, atol=0.01)
    orientation = [(274, "H", 1, turned, True)]
    tifffile.imwrite(tmp_path / "turned.tif", values, photometric="rgb", extratags=orientation)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.tif"), image)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_separate_planes_of_16_bits_are_refused_and_those_of_8_read(tmp_path, compression):
    options = {"photometric": "rgb", "planarconfig": "separate", "compression": compression}
    tifffile.imwrite(tmp_path / "deep.tif", np.moveaxis(COLOUR, -1, 0).astype(np.uint16) * 257, **options)
    with pytest.raises(UserError, match=r"deep\.tif.*separate planes"):
        read_image(tmp_path / "deep.tif")
    tifffile.imwrite(tmp_path / "shallow.tif", np.ascontiguousarray(np.moveaxis(COLOUR, -1, 0)), **options)
    np.testing.assert_array_equal(read_image(tmp_path / "shallow.tif"), COLOUR)


def test_one_hot_pixel_does_not_set_the_scale_of_a_deep_picture(tmp_path):
    values = RNG.normal(400, 30, (200, 200)).round().astype(np.uint16)
    plain = normalise(read_image(save(tmp_path / "plain.tif", values)))
    values[70, 80] = 65535
    image = read_image(save(tmp_path / "hot.tif", values))
    assert image.min() == 0
    assert image.max() == 1
    hot = normalise(image)
    assert abs(hot[:50].std() - plain[:50].std()) < 0.05
    assert abs(hot.std() - 1) < 1e-3


def test_a_picture_that_hardly_varies_is_normalised_all_the_same():
    image = np.full((30, 40, 3), 0.5, np.float32)
    image[:, 20:] += 2e-4
    assert abs(normalise(image).std() - 1) < 0.01
    assert (normalise(np.full((30, 40, 3), 0.5, np.float32)) == np.float32(1e-6)).all()


def test_grey_as_three_equal_channels_is_reduced_as_one(tmp_path):
    grey = RNG.integers(0, 256, (90, 120, 1), dtype=np.uint8)
    thin = np.broadcast_to(grey, (90, 120, 3))
    np.testing.assert_array_equal(shrink(thin, 40), shrink(np.ascontiguousarray(thin), 40))


def test_whatever_is_not_a_picture_is_one_clear_line_with_its_name(tmp_path):
    (tmp_path / "text.png").write_text("I am a text")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    whole = save(tmp_path / "whole.tif", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    whole = save(tmp_path / "whole.png", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "empty.png", "folder.png", "cut.tif", "cut.png", "missing.png"):
        for read in (read_image, read_mask_values):
            with pytest.raises(UserError, match=name) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_palette_mask_gives_indices_whatever_its_colours(tmp_path):
    picture = Image.fromarray(MASK).convert("P")
    picture.putpalette([4, 2, 4, 252, 254, 252])  # as DRIVE's second observer
    picture.putdata(MASK.ravel().tolist())
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "m.png"), MASK)


def test_one_bit_grey_and_equal_channels_give_the_stored_numbers(tmp_path):
    np.testing.assert_array_equal(read_mask_values(save(tmp_path / "bit.png", MASK * 255, "1")), MASK)
    np.testing.assert_array_equal(read_mask_values(save(tmp_path / "grey.png", MASK * 255)), MASK * 255)
    for channels in ([MASK] * 3, [MASK, MASK, MASK, MASK * 0 + 200], [MASK, MASK * 0 + 9]):
        path = save(tmp_path / f"{len(channels)}.png", np.dstack(channels))
        np.testing.assert_array_equal(read_mask_values(path), MASK)
    deep = read_mask_values(save(tmp_path / "deep.png", MASK.astype(np.uint16) * 300))
    np.testing.assert_array_equal(deep, MASK.astype(np.uint16) * 300)


@pytest.mark.parametrize("values", [[0, 1, 255], [0, 2], [1], [0, 128, 255]])
def test_gif_whose_greys_were_numbered_anew_is_refused(tmp_path, values):
    mask = np.resize(np.array(values, np.uint8), (4, 6))
    Image.fromarray(mask).save(tmp_path / "grey.gif")
    stored = np.array(Image.open(tmp_path / "grey.gif"))
    assert stored.max() < len(values), "Pillow no longer numbers the greys anew"
    with pytest.raises(UserError, match=r"grey\.gif.*PNG"):
        read_mask_values(tmp_path / "grey.gif")


def test_gif_of_greys_that_are_their_own_numbers_and_one_nearly_black_and_white_are_read(tmp_path):
    picture = Image.fromarray(np.resize(np.array([0, 1, 2], np.uint8), (4, 6)))
    picture.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2])
    picture.save(tmp_path / "ramp.gif")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "ramp.gif"), np.resize([0, 1, 2], (4, 6)))
    picture = Image.fromarray(MASK)
    picture.putpalette([2, 2, 2, 253, 253, 253])
    picture.save(tmp_path / "nearly.gif")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "nearly.gif"), MASK)


def test_black_and_white_gif_is_read_by_colour_because_its_indices_mean_nothing(tmp_path):
    for number, mask in enumerate((MASK, MASK * 0 + 1, MASK * 0)):
        path = save(tmp_path / f"{number}.gif", mask * 255)
        np.testing.assert_array_equal(read_mask_values(path), mask * 255)
    picture = Image.fromarray(1 - MASK).convert("P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.putdata((1 - MASK).ravel().tolist())
    picture.save(tmp_path / "swapped.gif")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "swapped.gif"), MASK * 255)


def test_jpeg_and_coloured_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"m\.jpg.*JPEG.*PNG"):
        read_mask_values(save(tmp_path / "m.jpg", MASK * 255))
    Image.fromarray(np.kron(MASK, np.ones((16, 16), np.uint8)) * 255).save(tmp_path / "j.tif", compression="jpeg")
    with pytest.raises(UserError, match=r"j\.tif.*JPEG.*PNG"):
        read_mask_values(tmp_path / "j.tif")
    with pytest.raises(UserError, match=r"c\.png.*colours"):
        read_mask_values(save(tmp_path / "c.png", COLOUR))
    with pytest.raises(UserError, match="whole numbers"):
        read_mask_values(save(tmp_path / "f.tif", MASK.astype(np.float32) / 2))


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        ({0}, "binary"),
        ({0, 1}, "binary"),
        ({1}, "binary"),
        ({0, 255}, "binary"),
        ({0, 1, 255}, "classes"),
        ({0, 1, 2}, "classes"),
        ({0, 1, 2, 255}, "classes"),
        ({0, 2}, "classes"),
        (set(range(12)) - {7, 10}, "classes"),
    ],
)
def test_meaning_of_mask_values(values, meaning):
    assert mask_meaning(values) == meaning


@pytest.mark.parametrize(
    "values", [{3, 17, 250}, {0, 1, 2, 253, 254, 255}, {0, 128}, {0, 128, 255}, set(), {255}, {0, 700}]
)
def test_unexpected_mask_values_are_refused(values):
    with pytest.raises(UserError):
        mask_meaning(values)


def test_255_is_foreground_in_a_binary_mask_and_ignored_among_classes():
    values = np.array([[0, 1, 255]], np.uint8)
    np.testing.assert_array_equal(decode_mask(values, "binary"), [[0, 1, 1]])
    np.testing.assert_array_equal(decode_mask(values, "classes"), [[0, 1, 255]])
    with pytest.raises(UserError, match="300"):
        decode_mask(np.array([[300]], np.uint16), "classes")


@pytest.mark.parametrize("size", [256, (200, 300)])
def test_field_of_view_is_found_in_the_image_alone(size):
    retina = make_retina(3, size)
    for image in (retina.image, retina.image.astype(np.float32) / 255):
        view = field_of_view(image)
        assert (view & retina.field_of_view).sum() / (view | retina.field_of_view).sum() > 0.95


def test_pictures_without_a_round_aperture_are_all_field_of_view():
    street = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    cells = np.zeros((100, 100, 3), np.uint8)
    cells[20:30, 20:80], cells[30:80, 45:55], cells[70:80, 5:95] = 200, 200, 200  # bright, black corners, not convex
    for image in (street, cells, np.zeros((9, 9, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)):
        assert field_of_view(image).all()


def test_a_stack_is_refused_and_a_preview_is_not(tmp_path):
    pages = [Image.fromarray(np.full((6, 8), value, np.uint8)) for value in (1, 2, 3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask_values):
        with pytest.raises(UserError, match=r"stack\.tif: a stack of 3 pictures: save each slice"):
            read(tmp_path / "stack.tif")
    small = [page.resize((4, 3)) for page in pages[1:2]] + [pages[2].resize((2, 1))]
    pages[0].save(tmp_path / "pyramid.tif", save_all=True, append_images=small)
    np.testing.assert_array_equal(read_mask_values(tmp_path / "pyramid.tif"), np.ones((6, 8)))


@pytest.mark.parametrize("first", [0, 255])
def test_a_palette_of_black_and_white_is_read_by_its_colours(tmp_path, first):
    """Programs that make pictures small number the two as they please: here white is 0, or black."""
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4] = 255
    picture = Image.fromarray(((mask != first) * 1).astype(np.uint8))
    picture.putpalette([first] * 3 + [255 - first] * 3)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "a.png"), mask)
    picture.putpalette([0, 0, 0, 128, 0, 0])  # dark red says nothing about which is the background
    picture.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_mask_values(tmp_path / "b.png"), (mask != first) * 1)


def test_an_object_on_a_dark_ground_is_no_aperture():
    """A black surround is no reason to leave out what sticks out of a convex, but not round, bright thing."""
    disc = cv2.circle(np.zeros((200, 200), np.uint8), (80, 100), 70, 180, cv2.FILLED)
    handle = cv2.rectangle(disc.copy(), (100, 90), (199, 110), 180, cv2.FILLED)
    brain = cv2.ellipse(np.zeros((200, 200), np.uint8), (100, 100), (85, 65), 0, 0, 360, 180, cv2.FILLED)
    plate = cv2.rectangle(np.zeros((200, 200), np.uint8), (30, 30), (169, 169), 180, cv2.FILLED)
    for picture in (handle, brain, plate):
        assert field_of_view(np.stack([picture] * 3, -1)).all()
    assert field_of_view(np.stack([disc] * 3, -1)).mean() == pytest.approx(np.pi * 70**2 / 200**2, rel=0.03)


@pytest.mark.parametrize("shape", [(200, 200), (150, 200), (200, 150), (160, 160)])
def test_an_aperture_that_the_frame_cuts_off_is_found(shape):
    picture = np.full((*shape, 3), 3, np.uint8)
    cv2.circle(picture, (shape[1] // 2, shape[0] // 2), 98, (180, 120, 80), cv2.FILLED)
    view = field_of_view(picture)
    inside = picture[..., 0] == 180
    assert (view & inside).sum() / (view | inside).sum() > 0.97
    assert not view[0, 0]
    assert not view[-1, -1]


@pytest.mark.skipif(not find_drive(REAL_DATA), reason="no DRIVE in data/ or the folder that UNET_DATA_ROOT names")
def test_field_of_view_agrees_with_the_official_masks_of_drive():
    paths = sorted(find_drive(REAL_DATA)[0].glob("*/images/*.tif"))
    assert len(paths) == 40
    for path in paths:
        official = read_mask_values(path.parent.parent / "mask" / f"{path.stem}_mask.gif") > 0
        view = field_of_view(read_image(path))
        assert (view & official).sum() / (view | official).sum() > 0.98, path.name


def test_normalisation_looks_at_the_field_of_view_only():
    image = RNG.integers(50, 200, (20, 20, 3), dtype=np.uint8)
    view = np.zeros((20, 20), bool)
    view[4:16, 4:16] = True
    image[~view] = 0
    result = normalise(image, view)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[view].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(result[view].std(axis=0), 1, atol=1e-5)
    assert (result[~view] == 0).all()
    image[~view] = 255  # what lies outside changes nothing
    np.testing.assert_array_equal(normalise(image, view), result)


def test_normalising_a_patch_with_the_statistics_of_its_image_is_cutting_the_normalised_image():
    image, view = RNG.random((12, 10, 3), dtype=np.float32), RNG.random((12, 10)) > 0.3
    patch = normalise(image[2:7, 3:9], view[2:7, 3:9], statistics_inside(image, view))
    np.testing.assert_array_equal(patch, normalise(image, view)[2:7, 3:9])


def test_normalisation_by_constants_agrees_with_torchvision():
    image, view = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8), RNG.random((12, 10)) > 0.3
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = TF.normalize(TF.to_tensor(image), weights.mean, weights.std).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(normalise(image, view, kind="imagenet")[view], expected[view], atol=1e-6)
    np.testing.assert_allclose(
        normalise(image / np.float32(255), view, kind="imagenet")[view], expected[view], atol=1e-5
    )
    np.testing.assert_allclose(normalise(image, view, kind="none")[view], image[view] / 255, atol=2e-6)
    assert (normalise(image, view, kind="imagenet")[~view] == 0).all()


@pytest.mark.parametrize("view", [np.ones((4, 4), bool), np.zeros((4, 4), bool)])
def test_constant_images_and_empty_views_stay_finite(view):
    assert np.abs(normalise(np.full((4, 4, 3), 7, np.uint8), view)).max() < 1e-5


def test_listing_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.mpo", ".hidden.png", "notes.txt", "paper.pdf", "drawing.eps"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.mpo"]
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(UserError, match=folder):
            list_images(tmp_path / folder)


def test_no_pixel_inside_the_field_of_view_is_normalised_to_exactly_what_stands_for_outside():
    grey = np.full((20, 20, 3), 128, np.uint8)
    assert not (normalise(grey) == 0).all(2).any()
    toy = grey.copy()
    toy[:5], toy[5:10] = 100, 156  # the mean is a value that occurs
    view = np.ones((20, 20), bool)
    view[:, 0] = False
    np.testing.assert_array_equal((normalise(toy, view) == 0).all(2), ~view)


# ---- masks in colours


def test_a_palette_is_black_or_the_most_frequent_colour_and_then_by_value(tmp_path):
    red, green, white = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    colours = np.array([white, white, red], np.uint8)[None]
    one = save(tmp_path / "1.png", colours)
    two = save(tmp_path / "2.png", np.array([[red, green, white, white]], np.uint8))
    assert find_palette([one, two]) == {0xFFFFFF: 0, 0x00FF00: 1, 0xFF0000: 2}
    three = save(tmp_path / "3.png", np.array([[(0, 0, 0), green]], np.uint8))
    found = find_palette([one, two, three])
    assert found == {0x000000: 0, 0x00FF00: 1, 0xFF0000: 2, 0xFFFFFF: 3}
    np.testing.assert_array_equal(decode_mask(read_mask_values(one, colours=True), found), [[3, 3, 2]])
    assert isinstance(find_palette([three]), Colours)  # though no colour has any red


def test_palette_grey_and_transparent_pictures_are_read_by_their_colours(tmp_path):
    picture = Image.fromarray(MASK)
    picture.putpalette([9, 8, 7, 0, 0, 255])
    picture.save(tmp_path / "p.png")
    picture.save(tmp_path / "p.gif")
    for name in ("p.png", "p.gif"):
        np.testing.assert_array_equal(read_mask_values(tmp_path / name, colours=True), np.array([0x090807, 255])[MASK])
        assert survey_mask(tmp_path / name) == ({0, 1}, {0: (9, 8, 7), 1: (0, 0, 255)})
    grey = save(tmp_path / "g.png", MASK * 128)
    assert set(np.unique(read_mask_values(grey, colours=True))) == {0, 0x808080}
    assert survey_mask(grey) == ({0, 128}, {})
    alpha = save(tmp_path / "a.png", np.full((2, 2, 4), (1, 2, 3, 0), np.uint8))
    assert (read_mask_values(alpha, colours=True) == 0x010203).all()
    deep = save(tmp_path / "d.png", MASK.astype(np.uint16) * 300)
    with pytest.raises(UserError, match=r"d\.png.*8 bits"):
        read_mask_values(deep, colours=True)
    cv2.imwrite(str(tmp_path / "e.png"), np.dstack([MASK] * 3).astype(np.uint16))
    with pytest.raises(UserError, match=r"e\.png.*8 bits"):
        read_mask_values(tmp_path / "e.png")


def test_smoothed_and_jpeg_like_masks_hold_too_many_colours(tmp_path):
    sharp = np.zeros((96, 96, 3), np.uint8)
    sharp[20:70, 30:60] = (255, 0, 0)
    plain = save(tmp_path / "sharp.png", sharp)
    smooth = Image.fromarray(sharp).rotate(17, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "smooth.png")
    assert 16 < len(np.unique(np.array(smooth).reshape(-1, 3), axis=0)) < 254
    with pytest.raises(UserError, match=r"smooth\.png.*colours.*data\.palette"):
        find_palette([plain, tmp_path / "smooth.png"])
    photo = save(tmp_path / "photo.png", RNG.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"photo\.png.*9\d\d\d colours"):
        find_palette([plain, photo])


def test_many_real_classes_some_of_them_small_are_no_smoothed_edges(tmp_path):
    colours = RNG.integers(0, 256, (254, 3), dtype=np.uint8)
    mask = np.zeros((100, 100), np.uint8)
    mask[:80] = np.arange(80).repeat(100).reshape(80, 100) % 40
    paths = []
    for number in range(7):  # 40 or so classes an image, and five of only a pixel or two
        mask[90, :5] = 249 + np.arange(5)
        paths.append(save(tmp_path / f"{number}.png", colours[np.where(mask < 200, mask + 40 * (number % 6), mask)]))
    assert 200 < len(find_palette(paths)) <= 254


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_masks_hold_indices_or_full_scale(tmp_path, ending):
    indices = read_mask_values(save(tmp_path / f"i.{ending}", MASK.astype(np.uint16) * 2))
    np.testing.assert_array_equal(decode_mask(indices, "classes"), MASK * 2)
    full = read_mask_values(save(tmp_path / f"f.{ending}", MASK.astype(np.uint16) * 65535))
    assert mask_meaning(set(np.unique(full))) == "binary"
    np.testing.assert_array_equal(decode_mask(full, "binary"), MASK)


def test_even_dull_deep_pictures_are_normalised():
    dull = 0.5 + 0.05 * RNG.standard_normal((40, 40, 3)).astype(np.float32)
    np.testing.assert_allclose(normalise(dull).std((0, 1)), 1, rtol=1e-3)


def test_a_line_of_pixels_is_reduced_to_a_line():
    assert images.shrink(np.zeros((1, 1000, 3), np.uint8), 240).shape == (1, 240, 3)


# ---- large pictures


@pytest.mark.parametrize("options", [{"tile": (64, 48), "compression": "zlib"}, {"tile": (16, 16)}, {}])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_large_tiff_is_read_as_a_small_one_is(tmp_path, monkeypatch, options, channels):
    values = np.random.default_rng(0).integers(0, 255, (100, 90, channels), dtype=np.uint8).squeeze()
    form = {"photometric": "rgb" if channels > 1 else "minisblack"} | ({"extrasamples": [2]} if channels == 4 else {})
    tifffile.imwrite(tmp_path / "a.tif", values, **form, **options)
    expected = read_image(tmp_path / "a.tif")
    monkeypatch.setattr(images, "LARGE", 1000)
    found = open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (100, 90, 3)
    assert (found.base is not None) == bool(options)  # a view of what lies on the disk


ODD_TIFFS = [
    {"photometric": "miniswhite"},
    {"photometric": "rgb", "planarconfig": "separate"},
    {"photometric": "rgb", "extratags": [(274, 3, 1, 6, True)]},
]


@pytest.mark.parametrize("form", ODD_TIFFS, ids=["white is 0", "planes", "turned"])
def test_a_large_tiff_of_an_unusual_kind_is_read_as_a_small_one_is(tmp_path, monkeypatch, form):
    shape = (100, 90) if form["photometric"] == "miniswhite" else (100, 90, 3)
    values = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    values = values.transpose(2, 0, 1) if "planarconfig" in form else values
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(64, 48), **form)
    expected = read_image(tmp_path / "a.tif")
    monkeypatch.setattr(images, "LARGE", 1000)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif"), expected)


def test_more_pixels_must_be_asked_for(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((100, 90), np.uint8), tile=(16, 16))
    tifffile.imwrite(tmp_path / "b.tif", np.ones((100, 90), np.uint8))
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match="--max-pixels 9000"):
        open_image(tmp_path / "a.tif")
    assert open_image(tmp_path / "a.tif", 9000).shape == (100, 90, 3)
    with pytest.raises(UserError, match="tiled TIFF"):
        open_image(tmp_path / "b.tif", 9000)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a\.tif"):
        open_image(tmp_path / "a.tif", 9000)


def test_the_field_of_view_of_a_large_picture_is_that_of_a_small_one(monkeypatch):
    retina = make_retina(2, (300, 330))
    exact = field_of_view(retina.image)
    monkeypatch.setattr(images, "VIEW_SIDE", 120)
    rough = field_of_view(retina.image)
    assert rough.shape == exact.shape
    assert (rough == exact).mean() > 0.98
    assert abs(images.view_diameter(rough) - images.view_diameter(exact)) <= 6
    assert images.view_diameter(exact) == pytest.approx(0.95 * 300, abs=6)


def test_statistics_do_not_depend_on_how_many_rows_are_summed_up_at_a_time(monkeypatch):
    image, view = make_retina(2, (60, 70)).image, make_retina(2, (60, 70)).field_of_view
    monkeypatch.setattr(images, "strips", lambda shape: [slice(0, 7), slice(7, 60)])
    mean, deviation = statistics_inside(image, view)
    np.testing.assert_allclose(mean, image[view].mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, image[view].std(0), rtol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_what_is_let_go_leaves_memory_and_keeps_its_values(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    array = on_disk((4000, 8000), np.uint8, tmp_path)
    array[:] = np.arange(8000) % 251
    before = resident()
    let_go(array[10:].T)  # a view will do
    assert before - resident() > 0.9 * array.nbytes
    assert (array[3999] == np.arange(8000) % 251).all()
    let_go(np.zeros(3))  # nothing to let go of


def test_a_deep_picture_that_opencv_refuses_is_read_with_8_bits(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 5, 3), 40_000, np.uint16))
    assert read_image(tmp_path / "deep.png").dtype == np.float32

    def refuse(*_):
        raise cv2.error("more than 2^20 pixels a side")

    monkeypatch.setattr(images.cv2, "imdecode", refuse)
    picture = read_image(tmp_path / "deep.png")
    assert (picture.shape, picture.dtype) == ((4, 5, 3), np.uint8)
