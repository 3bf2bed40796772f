"""Why a worker died, read from its exit code and the end of its stderr."""

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from cifar.errors import PEER_GONE
from cifar.memory import OUT_OF_MEMORY

Failure = Literal["failed", "oom"]

_NO_ROOM_FOR_ONEDNN = re.compile(
    r"could not (?:create a primitive|create a memory object|execute a primitive)$"
)
"""What oneDNN says of every error there; of a process short of memory it is the usual one."""
_LAUNCHER_ERRORS = ("ChildFailedError", "CalledProcessError", "SignalException")
_RANK = re.compile(r"^\[rank(\d+)\]:\s?")
_LOG_LINE = re.compile(r"^(?:\[rank\d+\]:)?[EWI]\d{4} \d\d:\d\d:\d\d")
_ROOT_RANK = re.compile(r"Root Cause .*?rank\s*:\s*(\d+)", re.DOTALL)
_END = re.compile(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)")
"""One of the ranks that torchrun lists at its end, and its exit code."""
_SIGNAL = re.compile(r"died with <Signals\.\w+: (\d+)>")
_HUNG = re.compile(r"cifar(?:: process \d+)?: timeout: (.+?)(?:; continue from .*)?$")
"""The line of `cifar.watchdog`, whose process ends without a traceback."""
_FRAME = (" ", "Traceback")
_LONGEST_REASON = 300


def classify(
    returncode: int, stderr: str, *, oom_kills: int = 0, limited: bool = False
) -> tuple[Failure, str]:
    """Status and one-line reason of a process that ended without a record.

    `returncode` is negative for a signal. `oom_kills` is how many processes the kernel killed for
    memory meanwhile: without it, and without a message, a SIGKILL is not called out of memory.
    `limited` says that the process ran under a memory limit, and so what oneDNN's errors mean.
    The launcher's own traceback only says that a child failed, so it is passed over.
    """
    errors = list(_tracebacks(stderr))
    own = _own_lines(stderr)
    root = _root_rank(errors, stderr)
    number = _signal(returncode, stderr, root)
    if memory := _memory(errors, own, root if number else None, limited):
        return "oom", memory
    if number == signal.SIGKILL and oom_kills:
        which = _process(root, " was ")
        return "oom", f"{which}killed by the kernel: the machine or the container ran out of memory"
    if hung := [match[1] for line in own if (match := _HUNG.match(line))]:
        return "failed", _short(hung[0])
    if errors and not (number and _only_peers(errors, root, own)):
        reason = _root_error(errors, root)
    elif number:
        reason = ": ".join([_describe(number, root), *own[-1:]])
    elif own:
        reason = own[-1]
    elif returncode == 0:
        reason = "ended with exit code 0 but wrote no record"
    else:
        reason = f"exit code {returncode} without a message"
    return "failed", _short(reason)


def _memory(
    errors: list[tuple[int | None, str]], own: list[str], aborted: int | None, limited: bool
) -> str:
    """What was said of too little memory and by which process, "" if nothing was.

    `aborted` is the one that a signal ended, whose last words bear no rank.
    """
    patterns = (OUT_OF_MEMORY, _NO_ROOM_FOR_ONEDNN) if limited else (OUT_OF_MEMORY,)
    for rank, text in (*errors, *((aborted, line) for line in own)):
        if any(pattern.search(text) for pattern in patterns):
            return _short(f"{_process(rank, ': ')}{text}")
    return ""


def _process(rank: int | None, then: str) -> str:
    return "" if rank is None else f"process {rank}{then}"


def _tracebacks(stderr: str) -> Iterator[tuple[int | None, str]]:
    """Rank (None: not said) and exception line of every traceback but the launcher's."""
    for rank, lines in _by_rank(stderr).items():
        for index, line in enumerate(lines):
            if not line.startswith("Traceback (most recent call last)"):
                continue
            message = _exception_line(lines[index + 1 :])
            if message and not _is_launchers(message):
                yield rank, message


def _by_rank(stderr: str) -> dict[int | None, list[str]]:
    """Lines by the `[rankN]:` in front of them, since the ranks' tracebacks interleave."""
    groups: dict[int | None, list[str]] = {}
    for line in stderr.splitlines():
        match = _RANK.match(line)
        rank = int(match[1]) if match else None
        groups.setdefault(rank, []).append(line[match.end() :] if match else line)
    return groups


def _is_launchers(message: str) -> bool:
    return message.split(":", maxsplit=1)[0].endswith(_LAUNCHER_ERRORS)


def _exception_line(lines: Iterable[str]) -> str:
    """The first line after the frames; with the next one if it ends with a colon."""
    texts = (line.rstrip() for line in lines)
    for text in texts:
        if text and not text.startswith(" "):
            return text if not text.endswith(":") else f"{text} {next(texts, '')}".strip()
    return ""


def _root_error(errors: list[tuple[int | None, str]], root: int | None) -> str:
    """The last exception of the rank that failed first, of any rank if that is not known.

    One that only tells of another rank's end counts where there is no other: the launcher looks at
    the ranks now and then, and may see two that failed together in either order.
    """
    causes = [each for each in errors if not PEER_GONE.search(each[1])] or errors
    first = [message for rank, message in causes if rank == root]
    return (first or [message for _, message in causes])[-1]


def _only_peers(errors: list[tuple[int | None, str]], root: int | None, own: Sequence[str]) -> bool:
    """Whether all exceptions are of ranks that only noticed that another one had ended."""
    others = root is not None and all(rank not in (None, root) for rank, _ in errors)
    return others and bool(own or all(PEER_GONE.search(message) for _, message in errors))


def _root_rank(errors: list[tuple[int | None, str]], stderr: str) -> int | None:
    """The rank that failed first, None if the launcher tells none.

    That is the one it saw first, unless that only noticed the end of another one, which a signal
    has ended; SIGTERM does not count, by which the launcher ends those that are left.
    """
    match = _ROOT_RANK.search(stderr)
    if match is None:
        return None
    seen = int(match[1])
    said = [message for rank, message in errors if rank == seen]
    if said and all(map(PEER_GONE.search, said)):
        for rank, code in _ends(stderr).items():
            if code < 0 and code != -signal.SIGTERM:
                return rank
    return seen


def _ends(stderr: str) -> dict[int, int]:
    """Exit codes by rank, of those that the launcher lists; negative for a signal."""
    return {int(rank): int(code) for rank, code in _END.findall(stderr)}


def _own_lines(stderr: str) -> list[str]:
    """What the worker said outside of tracebacks, before the launcher spoke."""
    lines = stderr.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("Traceback") and _is_launchers(_exception_line(lines[index + 1 :])):
            lines = lines[:index]
            break
    said = [line for line in lines if not _LOG_LINE.match(line) and not _RANK.match(line)]
    return [
        line.strip()
        for line in said
        if line.strip() and (line.lstrip().startswith("what():") or not line.startswith(_FRAME))
    ]


def _signal(returncode: int, stderr: str, root: int | None) -> int:
    """Number of the signal that ended the worker, of several the root; 0 if none did."""
    ends = _ends(stderr)
    if root in ends:
        return max(0, -ends[root])
    match = _SIGNAL.search(stderr)
    return int(match[1]) if match else max(0, -returncode)


def _describe(number: int, rank: int | None) -> str:
    """What ended a process, and which one if there were several."""
    which = _process(rank, " was ")
    names = {int(each): each.name for each in signal.Signals} | {signal.SIGKILL: "out of memory?"}
    name = f" ({names[number]})" if number in names else ""
    return f"{which}killed by signal {number}{name}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."
