"""What both command lines share: commands, options from dataclasses, errors, exit codes."""

import codecs
import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from cifar import ranks
from cifar.errors import (
    CifarError,
    ConfigError,
    OutOfMemoryError,
    PeerError,
    UnmetError,
    UserError,
)

T = TypeVar("T")

FIRST_PROCESS_SECONDS = 10.0
"""How long a process waits for the first one to meet the same bad input and end the job."""
MEMORY_SECONDS = 2.0
"""The same for memory: what does not fit in one process is met in the others at the same time."""

PEER_SECONDS = 5.0
"""How long a process that another one has left waits for the launcher to end it, too: the other's
own words say more."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What a full or broken disk says; of files that the programs write, they tell the name."""
_FRAME = "╭╮╰╯│ "
_RULE = "─-"
"""In which tyro writes: of hyphens where the terminal's encoding is not UTF-8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A word after the program's name: what it does in a line, and the function that does it.

    `run` takes the remaining words and returns the exit code.
    """

    help: str
    run: Callable[[list[str]], int]


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    example: str,
    default: T | None = None,
) -> T:
    """Fill a dataclass from command-line options, whose names, types and help are its fields'.

    Options that are not given keep `default`'s values. `--help` prints the description, the
    example, which is a whole command, and the options, and exits with 0.

    Raises:
        ConfigError: an unknown option or a bad value, in one line.
    """

    def read(words: Sequence[str]) -> T:
        options: T = tyro.cli(
            cls,
            prog=prog,
            description=f"{description}\n\nexample:\n  {example}",
            args=list(words),
            default=tyro.MISSING_NONPROP if default is None else cast(Any, default),
            config=(tyro.conf.OmitArgPrefixes,),
        )
        return options

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return read(argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = _own_words(stop) or _one_line(errors.getvalue(), argv, lambda: _options(read))
        more = "" if "--help" in text else f" (see {prog} --help)"
        raise ConfigError(text + more) from None


def _options(read: Callable[[Sequence[str]], object]) -> list[str]:
    """All that a command takes, `--name`, as its help lists them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        read(["--help"])
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.getvalue())


def _own_words(stop: SystemExit) -> str:
    """What a dataclass said of its fields, in whose frame tyro would break long words; or ""."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return "" if error is None else str(error)


def _one_line(box: str, argv: Sequence[str], options: Callable[[], list[str]]) -> str:
    """tyro's framed message as one line: the text between its first rules."""
    lines = [line.strip(_FRAME) for line in box.splitlines()[1:]]
    parts = [list(part) for ruled, part in itertools.groupby(lines, _is_rule) if not ruled]
    message = parts[0] if parts else []
    text = " ".join(message).removeprefix("Error parsing ")
    if unknown := re.fullmatch(r"Unrecognized options: (.*?)(?:, .*)?", text):
        return _unknown(unknown[1], argv, options)
    for pattern, phrase in _PHRASES:
        text = re.sub(pattern, phrase, text)
    return text


def _unknown(word: str, argv: Sequence[str], options: Callable[[], list[str]]) -> str:
    """What to say of a word that is no option, nor a value of one."""
    flag = next((each.partition("=")[0] for each in argv if each.endswith(f"={word}")), None)
    if flag is not None and not word.startswith("-"):
        return f"{flag.lstrip('-')}: {word!r}: takes no value; leave that out"
    if not word.startswith("-"):
        return f"{word!r}: belongs to no option; leave it out, or name its option before it"
    meant = _closest(word, options())
    return f"{word}: no such option" + (f"; did you mean {meant}?" if meant else "; leave it out")


def _closest(word: str, options: Sequence[str]) -> str | None:
    """The option that is spelt most like a word, whatever its hyphens and capitals."""
    letters = {re.sub("[-_]", "", option): option for option in options}
    wanted = re.sub("[-_]", "", word.partition("=")[0]).lower()
    found = difflib.get_close_matches(wanted, letters, n=1)
    return letters[found[0]] if found else None


def _is_of_type(match: re.Match[str]) -> str:
    kind = {"INT": "a whole number", "FLOAT": "a number"}.get(match[1], match[1])
    return f"{match[2]}: give {kind}"


def _is_choice(match: re.Match[str]) -> str:
    names = re.findall(r"'([^']*)'", match[3])
    if "None" in names:  # of what may be left out, which no user writes; tyro has made a set of it
        names = sorted(name for name in names if name != "None")
    return f"{match[2]}: {match[1]}: choose one of {', '.join(names)}"


def _is_missing(match: re.Match[str]) -> str:
    wanted = match[2][:1].lower() + match[2][1:]
    if match[1].startswith("{"):
        return f"{wanted}: none given: choose one of {match[1].strip('{}').replace(',', ', ')}"
    return f"{match[1]}: none given: give {wanted}"


_PHRASES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"no type matching (?:\{None\}\|)?(\w+) could be instantiated from \[(.*)\]\.", _is_of_type),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1: give a whole number"),
    (r"could not convert string to float: (.*)", r"\1: give a number"),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.", _is_choice),
    (r"Missing from [\w -]+: (\S+) (.*?)\.? \(required\)", _is_missing),
    (r"Missing value for argument '(.*)'\. Expected 1 values\.", r"\1: no value: give one"),
)
"""tyro's and Python's ways to say it, and ours: field, value and remedy."""


def _is_rule(line: str) -> bool:
    return not line.strip(_RULE)


def run_program(
    prog: str, summary: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> int:
    """Run the command that `argv` names and return the exit code.

    0 done, 1 failed, 2 bad input, 3 when another process is missing (`cifar.watchdog`),
    128 + signal when stopped. An error is one line on stderr; under
    a launcher the first process alone prints it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        code = _run(prog, summary, commands, words)
        sys.stdout.flush()
        return code
    except (UserError, OutOfMemoryError) as error:  # one process may meet it alone
        complain_of_input(prog, error)
        return error.exit_code
    except CifarError as error:
        if isinstance(error, PeerError) and _is_one_of_several():
            time.sleep(PEER_SECONDS)
            complain_of_own(prog, error)  # it may have been the first process that has ended
        else:
            complain(prog, str(error))
        return error.exit_code
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        _drop_output()
        complain(
            prog, f"output: cannot be written ({error.strerror}); make room, or write elsewhere"
        )
        return 1
    except KeyboardInterrupt:
        _complain_of_interruption(prog)
        return 130


def _run(prog: str, summary: str, commands: Mapping[str, Command], words: Sequence[str]) -> int:
    if not words:
        raise ConfigError(f"command: none given; see {prog} --help")
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("working folder: is gone; change to another one") from None
    if words[0] in ("-h", "--help"):
        print(_overview(prog, summary, commands))
        return 0
    if words[0] not in commands:
        raise ConfigError(f"command: {words[0]!r}: choose one of {', '.join(commands)}")
    return commands[words[0]].run(list(words[1:]))


_SPELLED = {
    "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
    "\N{EN DASH}": "-",
    "\N{PLUS-MINUS SIGN}": "+-",
}
"""Of tables and numbers, for terminals that cannot show them."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs, see `_SPELLED`; everything else is a question mark."""
    assert isinstance(error, UnicodeEncodeError), "in a stream that is written"
    text = error.object[error.start : error.end]
    return "".join(_SPELLED.get(each, "?") for each in text), error.end


def _prepare_streams() -> None:
    """Let printing succeed whatever the terminal's encoding, and with streams that are closed."""
    codecs.register_error("spell", _spell)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="spell")
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end


def _drop_output() -> None:
    """Let the interpreter's own last flush succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(prog: str, message: str) -> None:
    """One line on stderr, from the first process alone."""
    if _rank() == 0:
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def complain_of_input(prog: str, error: CifarError) -> None:
    """The same, but another process speaks up if it alone has met the error.

    It waits first: the launcher ends all processes as soon as one of them has failed, which must
    not be before the first has printed. Of memory it is said which process had too little.
    """
    rank = _rank()
    if rank and not isinstance(error, UnmetError):
        is_memory = isinstance(error, OutOfMemoryError)
        time.sleep(MEMORY_SECONDS if is_memory else FIRST_PROCESS_SECONDS)
    if rank or (isinstance(error, OutOfMemoryError) and _is_one_of_several()):
        complain_of_own(prog, error)
    else:
        complain(prog, str(error))


def complain_of_own(prog: str, error: CifarError) -> None:
    """One line on stderr that says which process it is of."""
    text = " ".join(str(error).split())
    print(f"{prog}: process {_rank()}: {text}", file=sys.stderr, flush=True)


def _complain_of_interruption(prog: str) -> None:
    """One line on stderr; from the first process alone where a launcher has interrupted all."""
    if _rank() and "TORCHELASTIC_RUN_ID" not in os.environ:
        print(f"{prog}: process {_rank()}: interrupted", file=sys.stderr, flush=True)
    else:
        complain(prog, "interrupted")


def _is_one_of_several() -> bool:
    try:
        return ranks.world_size(os.environ) > 1
    except ConfigError:
        return False


def _rank() -> int:
    """This process's rank; 0 if the environment does not tell it, lest nobody speaks."""
    try:
        return ranks.rank(os.environ)
    except ConfigError:
        return 0


def _overview(prog: str, summary: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [options]",
            "",
            summary.rstrip(),
            "",
            "commands:",
            *lines,
            "",
            f"{prog} COMMAND --help tells a command's options.",
        ]
    )
