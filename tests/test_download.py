"""Downloads from a local server: whole, resumed, refused, and what is unpacked."""

import dataclasses
import hashlib
import http.server
import io
import re
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from cifar.data import archives, tiny_imagenet
from cifar.data import download as module
from cifar.data.archives import ARCHIVES
from cifar.data.config import Published
from cifar.data.download import download
from cifar.data.sources import CIFAR_LAYOUTS
from cifar.errors import DataError
from cifar.files import in_turn

LAYOUT = CIFAR_LAYOUTS["cifar100"]
CONTENTS = {name: hashlib.sha256(name.encode()).digest() * 4000 for name in LAYOUT.files}


def make_archive(members: dict[str, bytes], *links: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as archive:
        for link in links:
            archive.addfile(link)
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return file.getvalue()


MEMBERS = {f"{LAYOUT.folder}/{name}": raw for name, raw in CONTENTS.items()}
RAW = make_archive(MEMBERS)
assert len(RAW) > 300_000


@dataclass
class Server:
    """What the local server sends, and the Range headers it was asked with."""

    url: str = ""
    body: bytes = RAW
    ranges: bool = True
    shift: int = 0
    announce_length: bool = True
    send_at_most: int | None = None
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    state: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state, wanted = self.state, self.headers["Range"]
        state.asked.append(wanted)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and state.ranges else 0
        if state.status or start >= len(state.body):
            self.send_error(state.status or 416)
            return
        body = state.body[start + state.shift if start else 0 :]
        self.send_response(206 if start else 200)
        if start:
            first = start + state.shift
            self.send_header(
                "Content-Range", f"bytes {first}-{len(state.body) - 1}/{len(state.body)}"
            )
        if state.announce_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: state.send_at_most])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Server()
    handler = type("Bound", (Handler,), {"state": state})
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{listener.server_port}/cifar-100-python.tar.gz"
    expect(monkeypatch, RAW, state.url)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


def expect(monkeypatch: pytest.MonkeyPatch, raw: bytes, url: str, name: str = "cifar100") -> None:
    md5 = hashlib.md5(raw).hexdigest()
    changed = dataclasses.replace(ARCHIVES[name], url=url, md5=md5)
    monkeypatch.setitem(module.ARCHIVES, name, changed)


def refusal(directory: Path, name: str = "cifar100", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        download(name, directory, progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_unpacked(directory: Path) -> None:
    """Exactly the files of the archive, and nothing else left in the folder."""
    assert [path.name for path in directory.iterdir()] == [LAYOUT.folder]
    found = {path.name: path.read_bytes() for path in (directory / LAYOUT.folder).iterdir()}
    assert found == CONTENTS


def part_of(directory: Path, raw: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    part = directory / "cifar100.tar.gz.part"
    part.write_bytes(raw)
    return part


def test_table_of_archives() -> None:
    assert tuple(ARCHIVES) == get_args(Published)
    for name, archive in ARCHIVES.items():
        assert re.fullmatch(r"[0-9a-f]{32}", archive.md5)
        assert archive.url.endswith(f".{archive.kind}")
        if name in CIFAR_LAYOUTS:
            number = name.removeprefix("cifar")
            assert archive.url == f"https://www.cs.toronto.edu/~kriz/cifar-{number}-python.tar.gz"


def test_download_makes_the_folder(server: Server, tmp_path: Path) -> None:
    directory = tmp_path / "new" / "cache"
    assert download("cifar100", directory, progress=False) == directory / LAYOUT.folder
    check_unpacked(directory)
    assert server.asked == [None]


def test_url_in_place_of_the_official_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, RAW, "http://127.0.0.1:1/never-asked")
    download("cifar100", tmp_path, url=server.url, progress=False)
    check_unpacked(tmp_path)


def test_already_there(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = download("cifar100", tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    assert download("cifar100", tmp_path) == first
    assert capsys.readouterr().err == f"{first}: already there\n"
    assert len(server.asked) == 1


def test_two_that_fetch_the_same_take_turns(server: Server, tmp_path: Path) -> None:
    """The second would write into the first one's file, and both sums be wrong."""
    server.send_at_most = None
    folders: list[Path] = []

    def fetch() -> None:
        folders.append(download("cifar100", tmp_path, progress=False))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    with in_turn(tmp_path):
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert server.asked == [] and folders == []
    for thread in threads:
        thread.join(timeout=60)
    assert len(folders) == 2 and len(server.asked) == 1
    check_unpacked(tmp_path)


def test_folder_that_is_not_complete(server: Server, tmp_path: Path) -> None:
    folder = download("cifar100", tmp_path, progress=False)
    (folder / "test").unlink()
    assert f"{folder}: lacks test; remove it" in refusal(tmp_path)


def test_resume(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path, RAW[:100_000])
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == ["bytes=100000-"]


def test_resume_from_a_server_without_range(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    part_of(tmp_path, RAW[:100_000])
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)


def test_resume_at_another_byte_than_asked_starts_over(server: Server, tmp_path: Path) -> None:
    server.shift = 5
    part_of(tmp_path, RAW[:100_000])
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == ["bytes=100000-", None]


def test_complete_part_needs_no_server(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path, RAW)
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == []


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_part_too_long_starts_over(server: Server, tmp_path: Path, extra: bytes) -> None:
    part_of(tmp_path, bytes(len(RAW)) + extra)
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == [f"bytes={len(RAW) + len(extra)}-", None]


def test_wrong_part_is_found_and_removed(server: Server, tmp_path: Path) -> None:
    part = part_of(tmp_path, bytes(100_000))
    message = refusal(tmp_path)
    assert "md5 is" in message
    assert "--data cifar100:DIR" in message
    assert not part.exists()
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)


def test_connection_that_closes_early(server: Server, tmp_path: Path) -> None:
    server.send_at_most = 50_000
    message = refusal(tmp_path)
    assert server.url in message
    assert "run again to resume" in message
    assert (tmp_path / "cifar100.tar.gz.part").read_bytes() == RAW[:50_000]
    server.send_at_most = None
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == [None, "bytes=50000-"]


def test_connection_that_closes_early_without_length(server: Server, tmp_path: Path) -> None:
    server.send_at_most, server.announce_length = 50_000, False
    assert "md5 is" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = module._read, []

    def interrupted(*args: Any) -> bytes:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(module, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("cifar100", tmp_path, progress=False)
    size = (tmp_path / "cifar100.tar.gz.part").stat().st_size
    assert 0 < size < len(RAW)
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)
    assert server.asked == [None, f"bytes={size}-"]


@pytest.mark.parametrize("status", [403, 404, 416, 500])
def test_http_errors(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    message = refusal(tmp_path)
    assert str(status) in message
    assert server.url in message
    assert "--data cifar100:DIR" in message


def test_a_failed_download_leaves_no_empty_folder(server: Server, tmp_path: Path) -> None:
    server.status = 404
    refusal(tmp_path / "new" / "below")
    assert list(tmp_path.iterdir()) == []


def test_no_server(server: Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        message = refusal(tmp_path, url=url)
    assert url in message
    assert "--data cifar100:DIR" in message


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "/a/path", "nonsense"])
def test_other_schemes(server: Server, tmp_path: Path, url: str) -> None:
    assert f"{url}: must begin with http" in refusal(tmp_path, url=url)


@pytest.mark.parametrize("url", ["http://[bad/x", "http://host:port/x", "http://a b/x"])
def test_malformed_addresses(server: Server, tmp_path: Path, url: str) -> None:
    assert f"download: {url}: " in refusal(tmp_path, url=url)


def test_body_without_end(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ARCHIVE_BYTES", 100_000)
    assert "more than 100,000 bytes" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(tmp_path / "file" / "below")
    assert str(tmp_path / "file") in message
    assert "choose another folder" in message


def serve(server: Server, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    server.body = raw
    expect(monkeypatch, raw, server.url)


def test_only_known_regular_files_are_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tarfile.TarInfo(f"{LAYOUT.folder}/train")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
    extra = {f"../{LAYOUT.folder}/test": b"x", f"{tmp_path}/abs": b"x", "other/meta": b"x"}
    dotted = {f"./{name}": raw for name, raw in MEMBERS.items()}
    serve(server, monkeypatch, make_archive({**extra, **dotted}, link))
    directory = tmp_path / "cache"
    download("cifar100", directory, progress=False)
    check_unpacked(directory)
    assert list(tmp_path.iterdir()) == [directory]


def test_first_of_two_members_counts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {f"./{LAYOUT.folder}/test": b"second"}
    serve(server, monkeypatch, make_archive({**MEMBERS, **again}))
    download("cifar100", tmp_path, progress=False)
    check_unpacked(tmp_path)


def test_member_missing_or_too_large(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {**MEMBERS, f"{LAYOUT.folder}/test": bytes(200_000)}
    lacking = {name: raw for name, raw in MEMBERS.items() if not name.endswith("/test")}
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 199_999)
    for number, members in enumerate((large, lacking)):
        serve(server, monkeypatch, make_archive(members))
        directory = tmp_path / str(number)
        assert f"lacks the files {LAYOUT.folder}/test; remove it" in refusal(directory)
        assert [path.name for path in directory.iterdir()] == ["cifar100.tar.gz.part"]


@pytest.mark.parametrize("raw", [b"", b"<html>", RAW[:200_000], RAW[:-50_000]])
def test_archive_that_is_none(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    expect(monkeypatch, raw, server.url)
    part_of(tmp_path, raw)
    message = refusal(tmp_path)
    assert "cifar100.tar.gz.part" in message
    assert "remove it" in message
    assert not (tmp_path / LAYOUT.folder).exists()


def test_plain_lines_off_a_terminal(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "PLAIN_LINE_BYTES", 100_000)
    download("cifar100", tmp_path)
    *lines, last = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6
    assert all(re.fullmatch(r"cifar100: \d+ of \d+ MiB", line) for line in lines)
    assert last == "cifar100: unpacking"


def test_bar_on_a_terminal(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100)
    )
    server.announce_length = False
    download("cifar100", tmp_path)
    check_unpacked(tmp_path)
    assert "cifar100" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


# Tiny ImageNet's archive is a zip of many files.

TINY = {
    "wnids.txt": b"n00000001",
    "words.txt": b"n00000001\ta",
    "val/val_annotations.txt": b"val_0.JPEG\tn00000001",
    "val/images/val_0.JPEG": b"v",
    "train/n00000001/n00000001_boxes.txt": b"n00000001_12.JPEG",
    "train/n00000001/images/n00000001_12.JPEG": b"t",
}
"""What is unpacked of it, below its folder."""
STRANGE = (
    "../wnids.txt",
    "../../tiny-imagenet-200/wnids.txt",
    "/tiny-imagenet-200/words.txt",
    "wnids.txt",
    *(
        f"tiny-imagenet-200/{name}"
        for name in (
            "../wnids.txt",
            "train/../wnids.txt",
            "train/n00000001/images/../../../../wnids.txt",
            "train/n00000001/images/n00000002_0.JPEG",
            "train/n00000001/images/n00000001_0.jpeg.exe",
            "train/n00000001/n00000002_boxes.txt",
            "train/n0000000\N{ARABIC-INDIC DIGIT ONE}/n0000000\N{ARABIC-INDIC DIGIT ONE}_boxes.txt",
            "val/images/val_0.JPEG\n",
            "val/images/sub/val_0.JPEG",
            "test/images/test_0.JPEG",
            "val/images/",
            "",
        )
    ),
)
"""What is not."""


def make_zip(members: dict[str, bytes], strange: tuple[str, ...] = STRANGE) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in strange:
            archive.writestr(name, b"strange")
        for name, raw in members.items():
            archive.writestr(f"tiny-imagenet-200/{name}", raw)
    return file.getvalue()


def offer_zip(monkeypatch: pytest.MonkeyPatch, directory: Path, raw: bytes) -> Path:
    """The archive, as if it had been fetched already."""
    expect(monkeypatch, raw, "http://127.0.0.1:1/never-asked.zip", "tiny-imagenet")
    directory.mkdir()
    part = directory / "tiny-imagenet.zip.part"
    part.write_bytes(raw)
    return part


def test_a_zip_s_known_files_alone_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    offer_zip(monkeypatch, directory, make_zip(TINY))
    folder = download("tiny-imagenet", directory, progress=False)
    assert folder == directory / "tiny-imagenet-200"
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == TINY
    assert list(directory.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == [directory]


def test_a_zip_s_link_is_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO(make_zip({name: raw for name, raw in TINY.items() if name != "words.txt"}))
    with zipfile.ZipFile(raw, "a") as archive:
        link = zipfile.ZipInfo("tiny-imagenet-200/words.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, b"/etc/hostname")
    offer_zip(monkeypatch, tmp_path / "cache", raw.getvalue())
    words = download("tiny-imagenet", tmp_path / "cache", progress=False) / "words.txt"
    assert not words.is_symlink()
    assert words.read_bytes() == b"/etc/hostname"


@pytest.mark.parametrize("name", tiny_imagenet.NEEDED)
def test_a_zip_that_lacks_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    without = {each: raw for each, raw in TINY.items() if each != name}
    part = offer_zip(monkeypatch, tmp_path / "cache", make_zip(without))
    message = refusal(tmp_path / "cache", "tiny-imagenet")
    assert message == f"download: {part}: lacks the files tiny-imagenet-200/{name}; remove it"
    assert list(part.parent.iterdir()) == [part]


def test_a_zip_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = make_zip({**TINY, "val/images/val_1.JPEG": bytes(10**6)})
    assert len(bomb) < 10_000
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 10**6)
    part = offer_zip(monkeypatch, tmp_path / "cache", bomb)
    message = refusal(tmp_path / "cache", "tiny-imagenet")
    assert message == f"download: {part}: more than 1,000,000 bytes unpacked; remove it"
    assert list(part.parent.iterdir()) == [part]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_zip_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    raw = bytearray(make_zip({**TINY, "val/images/val_1.JPEG": bytes(range(256))}, ()))
    if damage == "cut":
        del raw[len(raw) // 2 :]
    else:
        raw[raw.index(bytes(range(20, 40)))] ^= 1
    part = offer_zip(monkeypatch, tmp_path / "cache", bytes(raw))
    assert f"{part}: damaged: " in refusal(tmp_path / "cache", "tiny-imagenet")
    assert list(part.parent.iterdir()) == [part]
