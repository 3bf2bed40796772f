"""Download of published data sets: resumable, checked before anything is unpacked."""

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cifar.data.archives import ARCHIVES, Archive, extract
from cifar.errors import DataError
from cifar.files import in_turn, made

MIB = 2**20
MAX_ARCHIVE_BYTES = 256 * MIB
CHUNK_BYTES = MIB
TIMEOUT_SECONDS = 30.0
PLAIN_LINE_BYTES = 16 * MIB
"""Off a terminal a line is printed each time this much has come."""

Report = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes in all, None where the server does not say."""


def download(name: str, directory: Path, *, url: str | None = None, progress: bool = True) -> Path:
    """Fetch and unpack a data set of `ARCHIVES` into `directory`; the folder that holds its files.

    What was fetched before an interruption stays in `directory` as a `.part` file, and the next
    call goes on from there. `url` is another place for the same archive. Progress goes to stderr.

    Raises:
        DataError: the server, the network or the disk failed, the checksum differs, or the folder
            is there but not complete; names the address or path and the remedy.
    """
    archive = ARCHIVES[name]
    folder, part = directory / archive.folder, directory / f"{name}.{archive.kind}.part"
    try:
        with made(directory), in_turn(directory):  # another one may fetch it now
            if folder.exists():
                _check_complete(folder, archive)
                if progress:
                    print(f"{folder}: already there", file=sys.stderr)
                return folder
            if not part.exists() or _md5(part) != archive.md5:
                _fetch(name, url or archive.url, part, progress)
                _check_md5(name, url or archive.url, part)
            if progress:
                print(f"{name}: unpacking", file=sys.stderr, flush=True)
            extract(part, folder, archive)
            part.unlink()
    except OSError as error:
        where, reason = error.filename or directory, error.strerror or error
        raise DataError(f"download: {where}: {reason}; choose another folder") from None
    return folder


def _remedy(name: str) -> str:
    return f"run again to resume, or use your own copy: --data {name}:DIR"


def _check_complete(folder: Path, archive: Archive) -> None:
    missing = [file for file in archive.needed if not (folder / file).is_file()]
    if missing:
        raise DataError(f"download: {folder}: lacks {', '.join(missing)}; remove it and run again")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_md5(name: str, url: str, part: Path) -> None:
    found, expected = _md5(part), ARCHIVES[name].md5
    if found != expected:
        part.unlink()
        raise DataError(
            f"download: {url}: md5 is {found}, must be {expected}: damaged or another file, "
            f"removed; {_remedy(name)}"
        )


def _fetch(name: str, url: str, part: Path, progress: bool) -> None:
    """Bring `part` up to the whole of `url`, going on from what it holds where the server can."""
    with _network_errors(name, url):
        response, done = _open(url, part.stat().st_size if part.exists() else 0)
    total = None if response.length is None else done + response.length
    with response, part.open("ab" if done else "wb") as file, _reporter(name, progress) as report:
        report(done, total)
        while chunk := _read(response, name, url):
            file.write(chunk)
            done += len(chunk)
            if done > MAX_ARCHIVE_BYTES:
                part.unlink()
                raise DataError(
                    f"download: {url}: more than {MAX_ARCHIVE_BYTES:,} bytes; wrong url"
                )
            report(done, total)
    if total is not None and done < total:
        raise DataError(
            f"download: {url}: connection closed after {done:,} of {total:,} bytes; {_remedy(name)}"
        )


def _read(response: http.client.HTTPResponse, name: str, url: str) -> bytes:
    with _network_errors(name, url):
        return response.read(CHUNK_BYTES)


def _open(url: str, start: int) -> tuple[http.client.HTTPResponse, int]:
    """The response and the byte it begins with: `start`, or 0 from a server that cannot resume."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the scheme is checked
    try:
        response = urllib.request.build_opener().open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if not start or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        return _open(url, 0)
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return response, 0
    if response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return response, start
    response.close()
    return _open(url, 0)


@contextmanager
def _network_errors(name: str, url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = " ".join(str(error).strip("<>").split())
        raise DataError(f"download: {url}: {reason}; {_remedy(name)}") from None


@contextmanager
def _reporter(name: str, progress: bool) -> Iterator[Report]:
    """A bar on a terminal, now and then a line elsewhere, nothing when not wanted."""
    console = Console(stderr=True)
    if not progress:
        yield lambda _done, _total: None
    elif not console.is_terminal:
        yield _plain_lines(name)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        with Progress(*columns, TransferSpeedColumn(), console=console) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_lines(name: str) -> Report:
    next_line = 0

    def report(done: int, total: int | None) -> None:
        nonlocal next_line
        if done >= next_line or done == total:
            of_total = f" of {total / MIB:.0f}" if total else ""
            print(f"{name}: {done / MIB:.0f}{of_total} MiB", file=sys.stderr, flush=True)
            next_line = done + PLAIN_LINE_BYTES

    return report
