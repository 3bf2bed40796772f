"""The image operations of AutoAugment and its kin, another one for every sample of a batch.

Integer arithmetic throughout, so that CPU and GPU agree to the last bit. Results are Pillow's, as
`torchvision.transforms` applies it, but for differences of 1 where Pillow's floats round otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 20
ONE = 1 << _BITS
"""A factor of 1 in fixed point; 255 times three of them fit into 32 bits."""
_NUDGE = ONE >> 10
"""Added before rounding down, so that a product that is a whole number stays one."""
_GRAY = (19595, 38470, 7471)
"""Weights of red, green and blue in a grey value, in 2**-16 (ITU-R 601-2, as in Pillow)."""
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13
"""Of Pillow's `ImageFilter.SMOOTH`, whose other eight weights are 1."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation at one strength.

    | name | value |
    |---|---|
    | identity, auto-contrast, equalize, invert | none |
    | rotate | degrees, anti-clockwise |
    | shear-x, shear-y | pixels sideways per pixel |
    | translate-x, translate-y | pixels |
    | brightness, contrast, color, sharpness | factor, 1: unchanged |
    | hue | part of the circle of colours to go on by, 1 or -1: once around |
    | posterize | bits to keep |
    | solarize | smallest pixel value that is inverted |
    """

    name: str
    value: float = 0.0


def _affine(operation: Operation, height: int, width: int) -> tuple[float, ...]:
    """Row by row the 2x3 matrix from a pixel of the result to its source, (x, y) in pixels."""
    value = operation.value
    if operation.name == "rotate":
        angle, x, y = math.radians(value), width / 2, height / 2
        cos, sin = math.cos(angle), math.sin(angle)
        return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos
    return {
        "shear-x": (1.0, value, 0.0, 0.0, 1.0, 0.0),
        "shear-y": (1.0, 0.0, 0.0, value, 1.0, 0.0),
        "translate-x": (1.0, 0.0, -value, 0.0, 1.0, 0.0),
        "translate-y": (1.0, 0.0, 0.0, 0.0, 1.0, -value),
    }.get(operation.name, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))


def _sources(operation: Operation, height: int, width: int) -> Tensor:
    """Of every pixel of the result the nearest one of the image; height * width where it is black.

    `[height * width]` int32.
    """
    a, b, c, d, e, f = _affine(operation, height, width)
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    column, row = (a * x + b * y + c).floor().long(), (d * x + e * y + f).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, height * width).view(-1).int()


def _tones(operation: Operation) -> Tensor:
    """What becomes of every pixel value, `[256]` int32, where that needs no look at the image."""
    values = torch.arange(256, dtype=torch.int32)
    if operation.name == "brightness":
        return ((values * _fixed(operation.value) + _NUDGE) >> _BITS).clamp_(0, 255)
    if operation.name == "posterize":
        return values & (256 - (1 << (8 - int(operation.value))))
    if operation.name == "solarize":
        return torch.where(values >= operation.value, 255 - values, values)
    return 255 - values if operation.name == "invert" else values


def _fixed(factor: float) -> int:
    return round(factor * ONE)


class Operations:
    """A menu of operations, of which `__call__` serves every sample the one that it ordered."""

    def __init__(
        self, menu: Sequence[Operation], height: int, width: int, device: torch.device
    ) -> None:
        """Prepare the menu for images of this size."""

        def factors(name: str) -> Tensor:
            chosen = [_fixed(each.value) if each.name == name else ONE for each in menu]
            return torch.tensor(chosen, dtype=torch.int32, device=device)

        def flags(name: str) -> Tensor:
            return torch.tensor([each.name == name for each in menu], device=device)

        names = {each.name for each in menu}
        self._moves = bool(names & _MOVING)
        self._gray = torch.tensor(_GRAY, dtype=torch.int32, device=device).view(1, -1, 1, 1)
        moves = {each: number for number, each in enumerate(dict.fromkeys(map(_moving, menu)))}
        self._move_of = torch.tensor([moves[_moving(each)] for each in menu], device=device)
        self._sources = torch.stack([_sources(each, height, width) for each in moves]).to(device)
        self._tones = torch.stack([_tones(each) for each in menu]).to(device)
        self._adaptive = [
            (tones, flags(name)) for name, tones in _ADAPTIVE.items() if name in names
        ]
        self._contrast = factors("contrast") if "contrast" in names else None
        blended: dict[str, Callable[[Tensor], Tensor]] = {
            "color": self._grays,
            "sharpness": _smooth,
        }
        self._blends = [(other, factors(name)) for name, other in blended.items() if name in names]
        self._turns = Turns(menu, device) if "hue" in names else None

    def __call__(self, images: Tensor, orders: Tensor) -> Tensor:
        """Serve uint8 images `[B, C, H, W]`; `orders` `[B]` int64 are places in the menu."""
        if self._moves:
            images = self._move(images, orders)
        images = self._retone(images, orders)
        for other, factors in self._blends:
            factor = factors.index_select(0, orders).view(-1, 1, 1, 1)
            pixels = images.int()
            images = _blend(other(pixels), pixels, factor).to(torch.uint8)
        return images if self._turns is None else self._turns(images, orders)

    def _move(self, images: Tensor, orders: Tensor) -> Tensor:
        flat = images.flatten(2)
        black = flat.new_zeros(*flat.shape[:2], 1)
        moves = self._move_of.index_select(0, orders)
        sources = self._sources.index_select(0, moves).long().unsqueeze(1).expand_as(flat)
        return torch.cat((flat, black), 2).gather(2, sources).view(images.shape)

    def _retone(self, images: Tensor, orders: Tensor) -> Tensor:
        """Look every pixel up in a table of its sample and channel."""
        flat = images.flatten(2).long()
        tables = self._tones.index_select(0, orders).unsqueeze(1).expand(-1, flat.shape[1], -1)
        for tones, flags in self._adaptive:
            asked = flags.index_select(0, orders).view(-1, 1, 1)
            tables = torch.where(asked, tones(flat), tables)
        if self._contrast is not None:
            factor = self._contrast.index_select(0, orders).view(-1, 1, 1)
            mean = self._mean_gray(images).view(-1, 1, 1)
            asked = factor != ONE
            tables = torch.where(asked, _blend(mean, _values(images.device), factor), tables)
        return tables.to(torch.uint8).gather(2, flat).view(images.shape)

    def _grays(self, pixels: Tensor) -> Tensor:
        """Grey values of `[B, C, H, W]` int32: `[B, 1, H, W]`; pictures in other than three
        channels have no colours to lose."""
        if pixels.shape[1] != len(_GRAY):
            return pixels
        return ((pixels * self._gray).sum(1, keepdim=True, dtype=torch.int32) + (1 << 15)) >> 16

    def _mean_gray(self, images: Tensor) -> Tensor:
        """The mean grey value of every image, `[B]` int32, rounded."""
        grays = self._grays(images.int()).flatten(1)
        count = grays.shape[1]
        return ((2 * grays.sum(1) + count) // (2 * count)).int()


class Turns:
    """The turns of the hue in a menu, by way of hue, saturation and value of 8 bits each.

    As Pillow converts to HSV and back, so that a turn by 0 rounds the colours too. Source: Smith
    1978, "Color gamut transform pairs".
    """

    def __init__(self, menu: Sequence[Operation], device: torch.device) -> None:
        shifts = [int(each.value * 255) & 255 if each.name == "hue" else 0 for each in menu]
        self._shifts = torch.tensor(shifts, dtype=torch.int32, device=device)
        self._asked = torch.tensor([each.name == "hue" for each in menu], device=device)
        self._places = torch.tensor(_SECTORS, device=device)

    def __call__(self, images: Tensor, orders: Tensor) -> Tensor:
        """Serve uint8 images `[B, C, H, W]`; in other than three channels they have no hue."""
        if images.shape[1] != len(_GRAY):
            return images
        shifts = self._shifts.index_select(0, orders).view(-1, 1, 1)
        turned = self._turned(images.int(), shifts).to(torch.uint8)
        return torch.where(self._asked.index_select(0, orders).view(-1, 1, 1, 1), turned, images)

    def _turned(self, pixels: Tensor, shifts: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` int32 whose hue goes on by `[B, 1, 1]` of 256 parts."""
        value, chroma, hue = _value_chroma_hue(pixels)
        saturation = chroma * 255 // value.clamp(min=1)
        sixths = ((hue + shifts) & 255) * 6
        part = sixths % 255

        def darkened(by: Tensor | int) -> Tensor:
            """The value, less so many parts in 255 of the saturation; rounded."""
            kept = value * (255 * 255 - saturation * by)
            return (2 * kept + 255 * 255) // (2 * 255 * 255)

        levels = torch.stack((value, darkened(255 - part), darkened(part), darkened(255)), 1)
        places = self._places.index_select(0, (sixths // 255 % 6).view(-1))
        return levels.gather(1, places.view(*part.shape, 3).permute(0, 3, 1, 2))


_SECTORS = ((0, 1, 3), (2, 0, 3), (3, 0, 1), (3, 2, 0), (1, 3, 0), (0, 3, 2))
"""In each sixth of the circle, from red by way of green and blue, the level of every channel: 0 the
highest, 1 a rising, 2 a falling, 3 the lowest."""


def _value_chroma_hue(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[B, 3, H, W]` int32 the largest channel, what it is above the least, and the hue.

    Each `[B, H, W]` int32 in 0 to 255; where nothing is above the least the hue is 0.
    """
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    around = torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green)
    around = torch.where(red == value, green - blue, around)
    circle = 6 * chroma.clamp(min=1)
    return value, chroma, around % circle * 255 // circle


def _moving(operation: Operation) -> Operation:
    """The same where it moves pixels, else one that leaves them where they are."""
    return operation if operation.name in _MOVING else Operation("identity")


def _values(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.int32, device=device)


def _blend(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """`other` at a factor of 0, `pixels` at one of 1, beyond them at a greater one; int32."""
    return ((other * ONE + factor * (pixels - other) + _NUDGE) >> _BITS).clamp_(0, 255)


def _smooth(pixels: Tensor) -> Tensor:
    """`ImageFilter.SMOOTH` of `[B, C, H, W]` int32; the outermost pixels stay."""
    height, width = pixels.shape[-2:]
    if min(height, width) < 3:
        return pixels
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    boxes = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = boxes + (_SMOOTH_CENTRE - 1) * pixels[..., 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[..., 1:-1, 1:-1] = (inner + _SMOOTH_SUM // 2) // _SMOOTH_SUM
    return smooth


def _stretched(flat: Tensor) -> Tensor:
    """Tables `[B, C, 256]` that spread every channel of `[B, C, H * W]` int64 over 0 to 255."""
    low, high = (each.unsqueeze(2).int() for each in torch.aminmax(flat, dim=2))
    values = _values(flat.device)
    spread = ((values - low) * 255 // (high - low).clamp(min=1)).clamp_(0, 255)
    return torch.where(high > low, spread, values)


def _equalized(flat: Tensor) -> Tensor:
    """Tables `[B, C, 256]` that make all values about equally frequent, as Pillow does."""
    counts = flat.new_zeros(*flat.shape[:2], 256)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    levels = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255).int()
    return torch.where(step > 0, levels, _values(flat.device))


_MOVING = {"rotate", "shear-x", "shear-y", "translate-x", "translate-y"}
_ADAPTIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "auto-contrast": _stretched,
    "equalize": _equalized,
}
