"""A thread per process that ends it when another process of its group no longer comes.

Every process tells the others through the group's store, every few seconds and never from the
training loop, what it has done. One that has made no progress for `--collective-timeout` looks at
what the others tell: who does not answer any more, or who is not waiting as the rest are, is named
in one line, and the process ends with `EXIT_CODE`. Works for gloo and NCCL alike.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import NoReturn

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from cifar.meeting import Group
from cifar.pulse import PULSE, Pulse

EXIT_CODE = 3
"""Of a process whose group lacks another one."""
BACKSTOP = 2.0
"""torch's own timeout, in units of ours: it has to come later, as it names nobody; and work that a
process has announced may keep the others waiting that long."""
STOPPING_SECONDS = 10.0
"""Without progress once a signal asks to stop, after which a process whose peer does not answer
ends: a launcher signals the others when one has died, and kills them 30 s later."""
LEAST_INTERVAL, MOST_INTERVAL = 0.05, 1.0
"""Seconds between two looks."""
_LOOKS = 16
"""In the time that a process may make no progress."""
_ECHO_SECONDS = 3.0
"""How long all but one of the waiting processes leave it to that one to speak."""

_WAITING = (
    *("torch/distributed/", "torch/nn/parallel/", "torch/autograd/", "torch/cuda/"),
    *("torch/nn/modules/_functions.py", "torch/amp/", "deepspeed/", "cifar/distributed.py"),
)
"""Where a process is that waits for another one, or for its device, which does; elsewhere it marks
that by `Pulse.waiting`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a process tells the others; `number` grows as long as its watchdog is alive."""

    number: int
    host: str
    pid: int
    step: int = 0
    count: int = 0
    announced: str = ""
    place: str = ""
    """Where its main thread is, `file:line function`, if it makes no progress."""
    waits: bool = False
    """Whether it waits for others there."""


@dataclass(slots=True)
class _Seen:
    """Another process as this one sees it: its last beat, and for how many seconds it has told
    nothing new and made no progress."""

    beat: Beat
    quiet: float = 0.0
    still: float = 0.0

    def look(self, beat: Beat, seconds: float) -> None:
        self.quiet = 0.0 if beat != self.beat else self.quiet + seconds
        self.still = 0.0 if beat.count != self.beat.count else self.still + seconds
        self.beat = beat


class _Correspondent:
    """Tells and asks through the store, in a thread of its own: that may hang in C with it."""

    def __init__(self, group: Group, timeout: float) -> None:
        self.mine: Beat | None = None
        self.asks = False
        self.beats: dict[int, Beat] = {}
        self.rounds = 0
        self._group, self._timeout = group, timeout
        self.wake, self._ended = threading.Event(), False

    def end(self) -> None:
        self._ended = True
        self.wake.set()

    def run(self) -> None:
        store: PrefixStore | None = None
        while self.wake.wait() and not self._ended:
            self.wake.clear()
            try:
                if store is None:
                    own = self._group.address.connect(self._timeout)
                    store = PrefixStore(f"{self._group.name}/beats", own)
                self._round(store)
                self.rounds += 1
            except RuntimeError:  # it has gone, with rank 0 or the launcher
                store = None

    def _round(self, store: PrefixStore) -> None:
        assert self.mine is not None, "woken with something to tell"
        store.set(str(self._group.rank), json.dumps(asdict(self.mine)))
        for other in range(self._group.size) if self.asks else ():
            if other != self._group.rank and store.check([str(other)]):
                self.beats[other] = Beat(**json.loads(store.get(str(other))))


class Watchdog:
    """Watches over a group of several processes until `stop`; time that a process was suspended
    for, which its thread was too, does not count.

    `runs_ahead`: a process may have finished steps, as far as it knows, that its device has yet to
    compute, as under NCCL.
    """

    def __init__(
        self, group: Group, timeout: float, *, runs_ahead: bool = False, pulse: Pulse = PULSE
    ) -> None:
        self._runs_ahead = runs_ahead
        self._group, self._timeout, self._pulse = group, timeout, pulse
        self._interval = min(MOST_INTERVAL, max(LEAST_INTERVAL, timeout / _LOOKS))
        self._main = threading.main_thread().ident
        self._mine = Beat(number=0, host=socket.gethostname(), pid=os.getpid())
        self._still, self._watched = 0.0, 0.0
        """Seconds without progress, and those of them in which the others were asked."""
        self._seen: dict[int, _Seen] = {}
        self._rounds, self._unheard = 0, 0.0
        """Exchanges with the store, and seconds since the last one."""
        self._ended = threading.Event()
        self._correspondent = _Correspondent(group, max(1.0, timeout / 4))
        self._threads = [
            threading.Thread(target=work, name="watchdog", daemon=True)
            for work in (self._correspondent.run, self._run)
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no longer: the group is about to end."""
        self._ended.set()
        self._correspondent.end()
        for thread in self._threads:
            thread.join(1.0)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            # a process that was stopped wakes up long after: what it slept for is not counted
            self._look(min(now - last, 2 * self._interval))
            last = now

    def _look(self, seconds: float) -> None:
        pulse, mine = self._pulse, self._mine
        moved = (pulse.count, pulse.announced) != (mine.count, mine.announced)
        self._still = 0.0 if moved else self._still + seconds
        place, waits = "", False
        if watches := self._still >= self._patience / 2:
            place, waits = whereabouts(sys._current_frames().get(self._main or 0))
            waits = waits or pulse.waits
        self._mine = replace(
            mine,
            number=mine.number + 1,
            step=pulse.step,
            count=pulse.count,
            announced=pulse.announced,
            place=place,
            waits=waits,
        )
        self._watched = self._watched + seconds if watches else 0.0
        if not watches:
            self._seen.clear()
        self._listen(seconds)
        self._correspondent.mine, self._correspondent.asks = self._mine, watches
        self._correspondent.wake.set()
        if watches:
            self._observe(seconds)

    def _listen(self, seconds: float) -> None:
        heard, self._rounds = self._rounds, self._correspondent.rounds
        self._unheard = 0.0 if self._rounds != heard else self._unheard + seconds

    def _observe(self, seconds: float) -> None:
        for other, beat in list(self._correspondent.beats.items()):
            if other in self._seen:
                self._seen[other].look(beat, seconds)
            else:
                self._seen[other] = _Seen(beat)
        long_enough = min(self._still, 2 * self._watched) >= self._patience
        if long_enough and (told := self._verdict()):
            self._end(*told)

    @property
    def _patience(self) -> float:
        """Seconds without progress after which to look for a reason."""
        return min(self._timeout, STOPPING_SECONDS) if self._pulse.is_stopping else self._timeout

    def _verdict(self) -> tuple[str, int] | None:
        """What has happened and which rank is to say it; None if nothing is wrong."""
        long = self._patience / 4  # of the half of it that this one has looked at the others for
        is_early = self._still < self._timeout  # then only one that does not answer is missing
        if self._unheard > long:
            return self._lost() if not is_early or self._misses_first() else None
        others = {each for each in range(self._group.size) if each != self._group.rank}
        frozen = {
            each for each in others if each not in self._seen or self._seen[each].quiet > long
        }
        if is_early:
            frozen = {each for each in frozen if not self._has_announced(each)}
            if not frozen or self._pulse.announced:
                return None
        if not frozen:
            beats = {each: self._seen[each].beat for each in others} | {
                self._group.rank: self._mine
            }
            if any(beat.announced for beat in beats.values()):
                return None
            if any(seen.still < long for seen in self._seen.values()):
                return None  # another one goes on: it has still to come to where this one waits
            return missing(beats, self._still)
        told = "; ".join(self._silent(each) for each in sorted(frozen))
        return told, min((others | {self._group.rank}) - frozen)

    def _misses_first(self) -> bool:
        """Whether the silent store is that of rank 0, and nobody is known to be at long work.

        A launcher's goes with a launcher that was killed, whose processes save and end.
        """
        is_busy = bool(self._pulse.announced) or self._has_announced(0)
        return not self._group.address.is_launchers and not is_busy

    def _has_announced(self, rank: int) -> bool:
        """Whether another process was at long work of its own when it last told of itself."""
        return rank in self._seen and bool(self._seen[rank].beat.announced)

    def _silent(self, rank: int) -> str:
        if rank not in self._seen:
            return f"rank {rank} has not come at all ({self._still:.0f} s)"
        beat = self._seen[rank].beat
        # A step takes both, and it may have told of its last one no more.
        step = f"at least {beat.step}" if self._runs_ahead else max(beat.step, self._mine.step)
        return (
            f"{_named(rank, beat)} has not come since step {step} ({self._still:.0f} s ago) and "
            "does not answer"
        )

    def _lost(self) -> tuple[str, int]:
        address = self._group.address
        holder = "the launcher" if address.is_launchers else "rank 0"
        told = (
            f"{holder} at {address.host}:{address.port}, which has the group's store, has not "
            f"answered since step {self._mine.step} ({self._still:.0f} s ago)"
        )
        return told, 0 if address.is_launchers else 1

    def _end(self, told: str, speaker: int) -> NoReturn:
        """One of those who wait speaks; the launcher ends the others, or they end after it."""
        if speaker != self._group.rank and self._ended.wait(_ECHO_SECONDS):
            sys.exit()  # the group has ended after all
        who = f"cifar: process {self._group.rank}" if self._group.rank else "cifar"
        line = f"{who}: timeout: {told}; continue from the last checkpoint with --resume\n"
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), line.encode())
        os._exit(EXIT_CODE)


def missing(beats: Mapping[int, Beat], still: float) -> tuple[str, int]:
    """What to say where all answer and none goes on, and which rank is to say it.

    Missing is who has finished fewer steps, or else is elsewhere than where one waits.
    """
    ranks = sorted(beats)
    last = max(beat.step for beat in beats.values())
    away = [each for each in ranks if beats[each].step < last]
    away = away or [each for each in ranks if not beats[each].waits]
    if len(away) in (0, len(ranks)):
        where = "; ".join(f"rank {each} is at {beats[each].place}" for each in ranks[:8])
        told = f"no process goes on since step {last} ({still:.0f} s ago), all answer: {where}"
        return told, ranks[0]
    told = "; ".join(
        f"{_named(each, beats[each])} has not come since step {beats[each].step} ({still:.0f} s "
        f"ago): it is at {beats[each].place}"
        for each in away
    )
    return told, next(each for each in ranks if each not in away)


def _named(rank: int, beat: Beat) -> str:
    return f"rank {rank} ({beat.host}, pid {beat.pid})"


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place of a thread, as `file:line function`, and whether one waits there."""
    if frame is None:
        return "its end", False
    path = frame.f_code.co_filename.replace(os.sep, "/")
    name = "/".join(path.split("/")[-2:])
    waits = any(part in path for part in _WAITING)
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}", waits
