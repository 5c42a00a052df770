"""Retina photographs with labels, drawn from a seed: data for every notebook and test, with no file and no download.

Sections below: *background* (choroid, optic disc, macula, lesions), *tree* of arteries and veins, its *drawing*, and
*camera*. Lengths are in radii of the field of view, noise comes last: a seed gives one eye at any resolution.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import cv2
import numpy as np

from unet_helpers.config import IGNORE, UserError

BACKGROUND, ARTERY, VEIN = 0, 1, 2  # values of `artery_vein`
MIN_SIZE = 32  # pixels
FIELD_RADIUS = 0.95  # of half the shorter side
DISC_RADIUS, FOVEA_RADIUS = 0.145, 0.13  # the optic disc, where vessels enter, and the fovea, which has none
STEP = 0.02  # distance between neighbouring points of a vessel
TRUNK_WIDTH = {ARTERY: 0.028, VEIN: 0.036}  # of the vessels that leave the optic disc
THINNEST = 0.0085  # about one pixel at 256x256
MURRAY = 3  # Murray 1926: a vessel's width cubed is the sum of the cubes of the widths it divides into
ABSORPTION = {ARTERY: (0.12, 0.40, 0.34), VEIN: (0.22, 0.56, 0.42)}  # of red, green, blue light by a thick vessel
SUPERSAMPLING = 4  # vessels are drawn this much larger, then averaged
SHIFT = 4  # binary digits after the point in coordinates handed to OpenCV


@dataclass(frozen=True)
class SampleRetina:
    """A photograph and its labels."""

    image: np.ndarray  # uint8 (H, W, 3), RGB
    vessels: np.ndarray  # uint8 (H, W): 0 background, 1 vessel, 255 outside the field of view
    artery_vein: np.ndarray  # uint8 (H, W): 0 background, 1 artery, 2 vein (at a crossing: the upper one), 255 outside
    field_of_view: np.ndarray  # bool (H, W)


def make_retina(seed: int | Sequence[int], size: int | tuple[int, int] = 256) -> SampleRetina:
    """Draw the retina that belongs to a seed: a whole number from 0, or several, such as `(split, index)`.

    The size is height and width in pixels, or one number for both, at least 32. `UserError` for anything else.
    """
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side >= MIN_SIZE for side in sides):
        raise UserError(f"sample size {size!r}: give one whole number or (height, width), each at least {MIN_SIZE}")
    try:
        parts = [operator.index(part) for part in np.atleast_1d(seed)] or [-1]
        rng = np.random.default_rng([*parts, len(parts)])  # NumPy takes 3, (3, 0) and (3, 0, 0) for one seed
    except (TypeError, ValueError):
        raise UserError(f"sample seed {seed!r}: give a whole number from 0, or a sequence of such numbers") from None

    eye = _Eye(rng, *map(int, sides))
    coverage = _draw_tree(_grow_tree(rng, eye), eye)
    image = _photograph(rng, _background(rng, eye) * _transmission(rng, coverage, eye), eye)
    artery, vein = coverage[..., 0], coverage[..., 1]
    artery_vein = np.where(artery + vein < 0.5, BACKGROUND, np.where(vein > artery, VEIN, ARTERY)).astype(np.uint8)
    artery_vein[~eye.inside] = IGNORE
    return SampleRetina(image, np.where(artery_vein == VEIN, np.uint8(1), artery_vein), artery_vein, eye.inside)


class _Eye:
    """Where things lie: in units, y downwards and the macula right of the optic disc; in pixels, perhaps mirrored."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.disc = np.array([rng.uniform(-0.78, -0.5), rng.uniform(-0.15, 0.15)])
        self.macula = self.disc + np.array([rng.uniform(0.72, 0.88), rng.uniform(0, 0.1)])
        self.side = rng.choice([-1, 1])
        self.shape, self.centre = (height, width), np.array([(width - 1) / 2, (height - 1) / 2])
        self.radius = FIELD_RADIUS * min(height, width) / 2  # pixels per unit
        self.x = np.float32(self.side * (np.arange(width) - self.centre[0]) / self.radius)[None, :]
        self.y = np.float32((np.arange(height) - self.centre[1]) / self.radius)[:, None]
        self.distance = np.sqrt(self.x**2 + self.y**2)
        self.inside = self.distance < 1

    def pixels(self, points: np.ndarray) -> np.ndarray:
        return points * [self.side, 1] * self.radius + self.centre

    def cloud(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth noise (H, W) of variance about 1 with `cells` grains across the field of view."""
        grid, scale = rng.standard_normal((cells + 3, cells + 3), np.float32) * 1.4, cells / 2 / self.radius
        matrix = np.column_stack([np.eye(2) * scale, cells / 2 + 1 - scale * self.centre])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(grid, matrix, self.shape[::-1], None, flags, cv2.BORDER_REFLECT)


def _background(rng: np.random.Generator, eye: _Eye) -> np.ndarray:
    """Light that an eye without vessels sends back: float32 (3, H, W), about 0 to 1; channels first are faster here."""
    base = np.float32([0.86, 0.46, 0.26]) * np.exp(rng.normal(0, [0.05, 0.07, 0.15])).astype(np.float32)
    # Choroidal vessels are a blurred net behind the retina: so are the places where smooth noise crosses zero.
    density = sum(np.exp(-((eye.cloud(rng, n) / 0.35) ** 2)) for n in (9, 20)) * np.float32(rng.uniform(0.05, 0.15))
    density += 0.06 * eye.cloud(rng, 6) + 0.03 * eye.cloud(rng, 20) + 0.04 * eye.cloud(rng, 60)
    to_macula = (eye.x - eye.macula[0]) ** 2 + (eye.y - eye.macula[1]) ** 2
    density += rng.uniform(0.25, 0.5) * np.exp(to_macula / (-2 * rng.uniform(0.10, 0.16) ** 2))
    light = base[:, None, None] * np.exp(-density * np.float32([0.35, 1, 1])[:, None, None])

    radius = DISC_RADIUS * rng.uniform(0.85, 1.15)
    away = np.sqrt(((eye.x - eye.disc[0]) / 0.92) ** 2 + (eye.y - eye.disc[1]) ** 2) / radius
    away = (away + 0.05 * eye.cloud(rng, 9)).astype(np.float32)
    disc = np.float32([0.98, 0.82, 0.48]) * np.float32(rng.uniform(0.85, 1.05))
    disc_light = disc[:, None, None] + 0.15 * np.exp(-4 * away**2)
    light *= 1 + 0.2 * np.exp(-(away**2) / 4)
    light += 0.85 / (1 + np.exp((np.minimum(away, 3) - 1) * 14)) * (disc_light - light)
    for colour in ([0.92, 0.78, 0.42], [0.36, 0.10, 0.07]):  # exudates, haemorrhages
        there = (spots := _spots(rng, eye, rng.integers(0, 15))) > 0
        light[:, there] += 0.8 * spots[there] * (np.float32(colour)[:, None] - light[:, there])
    return light


def _spots(rng: np.random.Generator, eye: _Eye, count: int) -> np.ndarray:
    """Ragged ovals in a cluster: float32 (H, W) in [0, 1]."""
    canvas = np.zeros(eye.shape, np.uint8)
    cluster, angles = eye.macula + rng.normal(0, 0.3, 2), np.arange(12) * np.pi / 6
    for centre in rng.normal(cluster, 0.35, (count, 2)):
        axes = np.array([1, rng.uniform(0.25, 1)]) * rng.uniform(0.01, 0.04)
        oval = np.column_stack([np.cos(angles), np.sin(angles)]) * axes * rng.uniform(0.7, 1.3, (12, 1))
        oval = oval @ cv2.getRotationMatrix2D((0, 0), rng.uniform(0, 180), 1)[:, :2]
        cv2.fillPoly(canvas, [_fixed(eye.pixels(centre + oval))], int(rng.uniform(60, 255)), cv2.LINE_AA, SHIFT)
    return cv2.GaussianBlur(canvas, (0, 0), max(0.005 * eye.radius, 0.3)).astype(np.float32) / 255


class _Shoot(NamedTuple):
    """A vessel about to grow."""

    kind: int
    origin: np.ndarray
    start: float  # its heading in radians, which changes
    end: float  # to this one
    turn: float  # over this distance
    width: float
    length: float


def _grow_tree(rng: np.random.Generator, eye: _Eye) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Kind, points (n, 2) and widths (n,) of every vessel, grown breadth first: thin ones end at thick ones."""
    thickness, tortuosity = rng.uniform(0.9, 1.1), rng.uniform(0.15, 0.45)
    shoots, tree = [], []
    for kind, up in product((ARTERY, VEIN), (-1, 1)):
        for start, end, turn, width, length in (
            (rng.normal(88, 9), rng.normal(-3, 7), rng.uniform(0.38, 0.58), 1, 2.3),  # arcade round the macula
            (rng.normal(115, 9), rng.normal(150, 14), 0.3, rng.uniform(0.6, 0.8), 1.2),  # to the nose
            (rng.normal(35, 12), rng.normal(12, 8), 0.3, rng.uniform(0.3, 0.42), 0.7),  # to the macula
        ):
            origin, (start, end) = eye.disc + rng.normal(0, 0.025, 2), up * np.radians([start, end])
            shoots.append(_Shoot(kind, origin, start, end, turn, TRUNK_WIDTH[kind] * width * thickness, length))
    taken = np.zeros((3, 100, 100), bool)  # cells of 0.025 in which a vessel of this kind runs already
    for shoot in shoots:  # a list that grows as we go
        points, headings = _path(rng, shoot, tortuosity)
        column, row = ((points.T + 1.25) * 40).clip(0, 99).astype(int)
        blocked = taken[shoot.kind, row, column] & (np.hypot(*(points - eye.disc).T) > 1.4 * DISC_RADIUS)
        blocked[:5] = False  # still beside its parent
        blocked |= (np.hypot(*(points - eye.macula).T) < FOVEA_RADIUS) | (np.hypot(*points.T) > 1.05)
        free = int(blocked.argmax()) if blocked.any() else len(points)
        if free > 5:
            widths, children = _branch(rng, shoot, points[:free], headings)
            taken[shoot.kind, row[: len(widths)], column[: len(widths)]] = True
            tree.append((shoot.kind, points[: len(widths)], widths))
            shoots.extend(children)
    return tree


def _path(rng: np.random.Generator, shoot: _Shoot, tortuosity: float) -> tuple[np.ndarray, np.ndarray]:
    along = np.arange(0, shoot.length, STEP)
    phases, waves = rng.uniform(0, 2 * np.pi, (2, 1)), [[rng.uniform(0.12, 0.3)], [rng.uniform(0.35, 0.8)]]
    wiggle = np.sin(2 * np.pi * along / waves + phases).sum(axis=0) * np.minimum(along / 0.15, 1)
    headings = shoot.end + (shoot.start - shoot.end) * np.exp(-along / shoot.turn) + tortuosity * wiggle
    return shoot.origin + np.cumsum([np.cos(headings), np.sin(headings)], axis=1).T * STEP, headings


def _branch(rng, shoot: _Shoot, points: np.ndarray, headings: np.ndarray) -> tuple[np.ndarray, list[_Shoot]]:
    """Widths along a vessel, from which each branch takes its share by Murray's law, and the branches."""
    width, children, side = shoot.width, [], 2 * rng.integers(2) - 1
    widths = np.full(len(points), width)
    here = int(rng.uniform(0.1, 0.3) / STEP)
    while here < len(points):
        child = width * rng.uniform(0.4, 0.75)
        width = (width**MURRAY - child**MURRAY) ** (1 / MURRAY) * 0.97
        if width < THINNEST:
            return widths[:here], children
        widths[here:] = width
        if child > THINNEST:
            angle, side = side * rng.uniform(0.6, 1.1), -side if rng.random() < 0.8 else side
            end, length = headings[here] + angle * rng.uniform(0.2, 0.8), 0.15 + child * rng.uniform(25, 50)
            children.append(_Shoot(shoot.kind, points[here], headings[here] + angle, end, 0.2, child, length))
        here += int(rng.uniform(0.12, 0.34) / STEP)
    return widths, children


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * 2**SHIFT).astype(np.int32)


def _draw_tree(tree: list[tuple[int, np.ndarray, np.ndarray]], eye: _Eye) -> np.ndarray:
    """Float32 (H, W, 4) in [0, 1]: share of a pixel under arteries and under veins, depth of blood, light reflex."""
    canvas = np.zeros((eye.shape[0] * SUPERSAMPLING, eye.shape[1] * SUPERSAMPLING, 4), np.uint8)
    seen = [vessel for vessel in tree if vessel[2][0] * eye.radius >= 0.45]  # at this resolution
    for kind, points, widths in sorted(seen, key=lambda vessel: vessel[2][0]):  # thick ones run above thin ones
        depth = 255 * min(0.4 + 0.6 * widths.mean() / TRUNK_WIDTH[ARTERY], 1)
        points = (eye.pixels(points) + 0.5) * SUPERSAMPLING - 0.5
        ahead = (around := np.concatenate([points[:1], points, points[-1:]]))[2:] - around[:-2]
        normal = ahead[:, ::-1] * [-1, 1] / np.hypot(*ahead.T)[:, None]
        # OpenCV fills the outline too, which makes a shape one sub-pixel wider.
        half = normal * (np.maximum(widths * eye.radius, 1)[:, None] * SUPERSAMPLING - 1) / 2
        for share, reflex in ((1, 0), (0.3, 255 if kind == ARTERY else 70)):
            outline = np.concatenate([points + share * half, (points - share * half)[::-1]])
            colour = (255 * (kind == ARTERY), 255 * (kind == VEIN), depth, reflex)
            cv2.fillPoly(canvas, [_fixed(outline)], colour, cv2.LINE_8, SHIFT)
    return cv2.resize(canvas, eye.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _transmission(rng: np.random.Generator, coverage: np.ndarray, eye: _Eye) -> np.ndarray:
    """Share of the light that the vessels let through (Beer-Lambert): float32 (3, H, W)."""
    artery, vein, depth, reflex = np.moveaxis(coverage, -1, 0)
    contrast = np.float32(rng.uniform(0.6, 1.05)) * np.exp(0.35 * eye.cloud(rng, 3))
    strength = contrast * depth * (1 - 0.45 * reflex) / (artery + vein + 1e-6)
    of_artery, of_vein = (np.float32(ABSORPTION[kind])[:, None, None] for kind in (ARTERY, VEIN))
    return np.exp(-strength * (artery * of_artery + vein * of_vein))


def _photograph(rng: np.random.Generator, light: np.ndarray, eye: _Eye) -> np.ndarray:
    """Uneven light, blur, the colour of this camera, and noise: uint8 (H, W, 3)."""
    slope, falloff = rng.normal(0, 0.1, 2), rng.uniform(0.1, 0.35)
    shade = np.exp(slope[0] * eye.x + slope[1] * eye.y - falloff * eye.distance**2 + 0.1 * eye.cloud(rng, 2))
    shade *= np.clip((1 - eye.distance) * eye.radius + 0.5, 0, 1)
    image = light * np.float32(np.exp(rng.normal(0, [0.05, 0.07, 0.10])))[:, None, None] * np.float32(shade)
    image = cv2.GaussianBlur(cv2.merge(image), (0, 0), max(rng.uniform(0.003, 0.007) * eye.radius, 0.3))
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.85, 1.15))
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2.5, 6))
    return np.clip(np.round(255 * image + (0.2 + image) * noise), 0, 255).astype(np.uint8)
