"""Files that are whole or absent whatever happens, and folders that one process writes."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from cifar.errors import ConfigError, DataError, UserError

LOCK = ".lock"
LONGEST_NAME = 255
"""Bytes of a file's name that Linux's file systems take."""
PARTIAL = ".writing-"
"""How the name of a folder begins that is being written, or deleted."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks say, such as some network ones."""


def user_path(text: str, name: str) -> Path:
    """A path as a user wrote it: `~` and `~user` stand for home folders.

    Raises:
        ConfigError: no such user, no text, or none that UTF-8 can write; calls the option `name`.
    """
    if not text or not is_writable_text(text):
        raise ConfigError(f"{name}: {text!r}: is no path in UTF-8; give another one")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: {text!r}: no such user; write the path without ~") from None


def is_writable_text(text: str) -> bool:
    """Whether UTF-8 can write it; it cannot write a file's name that is not in UTF-8 itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_place(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Raise a ConfigError if a file or folder that a user named cannot be written.

    Calls the option `name`.
    """
    folder = path if is_folder else path.parent
    parents = (folder, *folder.absolute().parents)
    there = next(each for each in parents if os.path.exists(each))  # noqa: PTH110 - never raises
    is_free = is_folder or not os.path.isdir(path)  # noqa: PTH112
    fits = all(len(os.fsencode(part)) <= LONGEST_NAME for part in path.parts)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK) and is_free and fits:
        return
    another = "folder" if is_folder else "file"
    raise ConfigError(f"{name}: {str(path)!r}: cannot be written; give another {another}")


def is_file(path: Path, name: str) -> bool:
    """Whether there is a file at a path that a user named.

    Raises:
        UserError: nobody can tell: a folder that may not be searched, a name that is too long;
            calls the option `name`.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{name}: {str(path)!r}: {error.strerror}; give another path") from None


def check_data_file(path: Path, remedy: str) -> None:
    """Raise a DataError if there is no file of a data set at `path`, but nothing or a folder."""
    if not path.is_file():
        what = "is no file" if path.exists() else "no such file"
        raise DataError(f"data: {path}: {what}; {remedy}")


def subfolders(folder: Path, name: str) -> list[str]:
    """The names of the folders in one that a user named, sorted; none if it is not there.

    Raises:
        UserError: it cannot be read; calls the option `name`.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{name}: {str(folder)!r}: {error.strerror}; give another path") from None


def write_atomic(path: Path, content: str | bytes, *, replaces: bool = True) -> None:
    """Write a file so that a reader, or a crash, sees the old contents or the new, never a part.

    Text is written in UTF-8.

    Raises:
        FileExistsError: there is one already, and this `replaces` none.
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # not what a link of that name points to
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            temporary.replace(path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Delete what processes that were killed have left half written; nobody else may write there.

    Raises:
        OSError: the folder cannot be written.
    """
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)
    for left_over in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, which none may have; by renaming where there are no hard links.

    Raises:
        FileExistsError: one has it.
        OSError: the folder cannot be written.
    """
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        path.touch(exist_ok=False)
        temporary.replace(path)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those around it; what this has made and stays empty goes again at the end.

    Raises:
        FileExistsError: a file has that name.
        OSError: it cannot be made.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in one, and so in those around it
            for each in new:
                each.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While entered, no other process can enter it for this folder; a killed one's lock is gone.

    Where the file system has no locks a line on stderr tells, and anyone enters.

    Raises:
        BlockingIOError: another process is in there.
        OSError: the folder cannot be written.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            note = f"note: {folder}: cannot be locked here; start one run at a time there"
            print(note, file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """While entered, others that enter it for this folder wait; it leaves no file there.

    Where the file system has no locks nobody waits.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
