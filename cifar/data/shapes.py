"""The embedded data set: ten kinds of shape, drawn from a seed, the same bytes everywhere.

Two rules make the bytes independent of numpy's version and of the processor. All randomness is
`random_sample` and `bytes` of `numpy.random.RandomState`, whose streams numpy has frozen (NEP 19).
All arithmetic is elementwise float32 `+ - * /`, `sqrt`, `floor` and comparisons, which IEEE 754
rounds in exactly one way: no sin, exp, power, dot or sum. Grids are `[32, 32, N]`, images
innermost, so that what differs from image to image broadcasts along contiguous memory.

The shapes are signed distance functions (https://iquilezles.org/articles/distfunctions2d).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cifar.data.dataset import Dataset, Split
from cifar.errors import DataError

Array = npt.NDArray[np.floating]
Distance = Callable[[Array, Array], Array]

SIZE = 32
CHANNELS = 3
CHUNK = 100
"""Images drawn at once, few enough to stay in cache; part of the stream of random numbers."""

# How hard the set is. Lengths are in pixels, colours in grey levels of 0..255.
RADIUS = (6.3, 10.4)
"""Least and greatest size: half the width of the cross, about that of the others."""
TURN = 0.27
"""Tangent of half the greatest angle by which a shape is turned: 30 degrees either way."""
CONTRAST = (58.0, 150.0)
"""Shape against ground in the channel where they differ most, before clipping to 0..255."""
TEXTURE = 20.0
"""Greatest amplitude of the stripes on ground and shape."""
NOISE = 32.0
"""Amplitude of the uniform noise on every pixel and channel."""


def _both(a: Array, b: Array) -> Array:
    """The intersection of two shapes."""
    inside: Array = np.maximum(a, b)
    return inside


def _either(a: Array, b: Array) -> Array:
    """The union of two shapes."""
    inside: Array = np.minimum(a, b)
    return inside


def _circle(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.9


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - 0.7) - 0.24


def _semicircle(u: Array, v: Array) -> Array:
    v = v + 0.42
    return _both(np.sqrt(u * u + v * v) - 1.05, -v)


def _crescent(u: Array, v: Array) -> Array:
    v = v + 0.2
    w = v - 0.55
    return _both(np.sqrt(u * u + v * v) - 1, 0.85 - np.sqrt(u * u + w * w))


def _triangle(u: Array, v: Array) -> Array:
    return _both(0.8660254 * np.abs(u) - 0.5 * v, v) - 0.54


def _square(u: Array, v: Array) -> Array:
    return _both(np.abs(u), np.abs(v)) - 0.78


def _hexagon(u: Array, v: Array) -> Array:
    v = np.abs(v)
    return _both(0.8660254 * np.abs(u) + 0.5 * v, v) - 0.85


def _star(u: Array, v: Array) -> Array:
    """Inside at least four of a pentagram's five lines: the second largest distance counts."""
    u = np.abs(u)
    left, right, tip = 0.809017 * v - 0.5877853 * u, 0.809017 * v + 0.5877853 * u, -v
    side = 0.9510565 * u - 0.309017 * v
    second = _both(_either(tip, side), _either(_both(tip, side), right))
    return _both(left, second) - 0.309017


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return _both(_both(u, v) - 1, _either(u, v) - 0.3)


def _heart(u: Array, v: Array) -> Array:
    u, v = np.abs(u), 0.1 - v
    w, x = u - 0.45, v - 0.45
    return _either(np.sqrt(w * w + x * x) - 0.6363961, (u + np.abs(v) - 0.9) * 0.7071068)


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "ring": _ring,
    "semicircle": _semicircle,
    "crescent": _crescent,
    "triangle": _triangle,
    "square": _square,
    "hexagon": _hexagon,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
"""Class name and signed distance (negative inside) at `u` to the right and `v` down, in sizes."""

_AXIS = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
_X, _Y = _AXIS[None, :, None], _AXIS[:, None, None]


class _Pencil:
    """Turns a stream of random numbers into `[32, 32, N]` grids, N images at a time."""

    def __init__(self, rng: np.random.RandomState, count: int) -> None:
        self.rng = rng
        self.count = count

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """Random numbers `[*shape, N]` in `low..high`."""
        draws = self.rng.random_sample((*shape, self.count))
        return (low + (high - low) * draws).astype(np.float32)

    def frame(self, margin: Array) -> tuple[Array, Array]:
        """Pixel coordinates about a random centre at least `margin` inside the edge, turned."""
        t = self.uniform(-TURN, TURN)
        # Half-angle formulas: exact where sin and cos differ between libraries.
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        reach = (SIZE - 1) / 2 - margin
        x, y = _X - reach * self.uniform(-1, 1), _Y - reach * self.uniform(-1, 1)
        return x * cos + y * sin, y * cos - x * sin

    def shape(self, distance: Distance) -> Array:
        """Coverage, 0..1, by one shape of a class."""
        size = self.uniform(*RADIUS)
        u, v = self.frame(size + 1)
        return _coverage(distance(u / size, v / size) * size)

    def stripes(self) -> Array:
        """Triangle waves in -1..1 of random direction, with periods of 2.8 pixels and more."""
        phase = _X * self.uniform(-0.25, 0.25) + _Y * self.uniform(-0.25, 0.25)
        phase += self.uniform(0, 1)
        return np.abs(phase - np.floor(phase) - 0.5) * 4 - 1

    def noise(self) -> Array:
        """Uniform noise `[3, 32, 32, N]` in -1..1."""
        shape = (CHANNELS, SIZE, SIZE, self.count)
        octets = np.frombuffer(self.rng.bytes(CHANNELS * SIZE * SIZE * self.count), np.uint8)
        return octets.reshape(shape).astype(np.float32) / 127.5 - 1


def _coverage(distance: Array) -> Array:
    """How much of a pixel lies inside an edge at that signed distance in pixels."""
    share: Array = np.clip(0.5 - distance, 0, 1)
    return share


def _draw(pencil: _Pencil, distance: Distance) -> npt.NDArray[np.uint8]:
    """Images `[3, 32, 32, N]` of one class: striped ground, striped shape, noise."""
    ground = pencil.uniform(50, 205, CHANNELS)
    step = pencil.uniform(-1, 1, CHANNELS)
    step = step / np.abs(step).max(axis=0) * pencil.uniform(*CONTRAST)
    shape = pencil.shape(distance)
    ground_stripes, ground_amplitude = pencil.stripes(), pencil.uniform(-TEXTURE, TEXTURE, CHANNELS)
    shape_stripes, shape_amplitude = pencil.stripes(), pencil.uniform(-TEXTURE, TEXTURE, CHANNELS)
    images = pencil.noise() * NOISE
    for c in range(CHANNELS):
        image = ground[c] + ground_stripes * ground_amplitude[c]
        image += shape * (ground[c] + step[c] + shape_stripes * shape_amplitude[c] - image)
        images[c] += image
    return np.clip(images, 0, 255, out=images).astype(np.uint8)


def _split(rng: np.random.RandomState, count: int) -> Split:
    order = np.argsort(rng.random_sample(count), kind="stable")
    images = np.empty((count, CHANNELS, SIZE, SIZE), np.uint8)
    labels = np.empty(count, np.int64)
    for label, distance in enumerate(DISTANCES.values()):
        places = order[label :: len(DISTANCES)]
        labels[places] = label
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK]
            images[chunk] = np.moveaxis(_draw(_Pencil(rng, len(chunk)), distance), -1, 0)
    return Split(images=images, labels=labels)


def load_shapes(seed: int = 0, *, train: int = 10_000, test: int = 2_000) -> Dataset:
    """Draw `train` and `test` images `[N, 3, 32, 32]`, as many of each class as possible.

    Colours, place, size and angle are random and independent of the class, so that neither colour
    nor any single pixel tells the class, and a flipped image belongs to the same class.

    Raises:
        DataError: a count below 1 or a seed outside 0..2**32-1.
    """
    for field, count in (("train", train), ("test", test)):
        if count < 1:
            raise DataError(f"shapes: {field}: {count}: must be 1 or more images")
    if not 0 <= seed < 2**32:
        raise DataError(f"shapes: seed: {seed}: must lie in 0..{2**32 - 1}")
    return Dataset(
        name="shapes",
        classes=tuple(DISTANCES),
        train=_split(np.random.RandomState([seed, 0]), train),
        test=_split(np.random.RandomState([seed, 1]), test),
    )
