"""Random draws that depend only on (seed, epoch, sample, name of the draw).

Counter-based: each draw is a hash of its coordinates in 32-bit integer arithmetic, so CPU and GPU,
any number of processes and any resumed run draw the same numbers. The hash is two rounds of
`lowbias32` (https://nullprogram.com/blog/2018/07/31/), keyed by SHA-256 of seed, epoch and name.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on 32-bit values held in int64; products wrap, their low 32 bits are exact."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_samples(seed: int, epoch: int, name: str, count: int, device: torch.device) -> Tensor:
    """One value in [0, 2**32) per sample, `[count]` int64."""
    key = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    first, second = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
    samples = torch.arange(count, dtype=torch.int64, device=device)
    return _mix(_mix(samples ^ first) ^ second)


class Table:
    """Values that draws choose from, copied to a device when first asked for there.

    Copying waits for a GPU, so no step may do it anew.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The values on a device."""
        if device not in self._copies:
            self._copies[device] = self._values.to(device)
        return self._copies[device]


class EpochDraws:
    """The draws of every sample in one epoch."""

    def __init__(self, seed: int, epoch: int, count: int, device: torch.device) -> None:
        self.epoch = epoch
        self.count = count
        self.device = device
        self._seed = seed
        self._made: dict[str, Tensor] = {}

    def _hashed(self, name: str, epoch: int) -> Tensor:
        return hash_samples(self._seed, epoch, name, self.count, self.device)

    def integers(self, name: str, high: int, *, lasting: bool = False) -> Tensor:
        """Uniform integers in [0, high), `[count]` int64; high up to 2**31.

        `lasting` ones are the same in every epoch.
        """
        return (self._hashed(name, 0 if lasting else self.epoch) * high) >> 32

    def order(self) -> Tensor:
        """The epoch's permutation of the samples, `[count]` int64; ties keep sample order."""
        return torch.argsort(self._hashed("order", self.epoch), stable=True)

    def once(self, name: str, make: Callable[["EpochDraws"], Tensor]) -> Tensor:
        """What `make` makes of these draws for every sample, `[count]`, kept under its name."""
        if name not in self._made:
            self._made[name] = make(self)
        return self._made[name]

    def of(self, samples: Tensor) -> "SampleDraws":
        """The draws of the samples with these indices, `[B]` int64."""
        return SampleDraws(self, samples)


class SampleDraws:
    """The draws of the samples of one batch; `samples` `[B]` int64 are their indices."""

    def __init__(self, epoch: EpochDraws, samples: Tensor) -> None:
        self.samples = samples
        self._epoch = epoch

    def pick(self, name: str, make: Callable[[EpochDraws], Tensor]) -> Tensor:
        """These samples' share, `[B]`, of what `make` makes of the epoch's draws.

        That is made for all samples when first asked for, so that a batch costs one look-up,
        and kept under `name`.
        """
        return self._epoch.once(name, make).index_select(0, self.samples)
