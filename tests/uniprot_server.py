"""A real HTTP server with the layout of UniProt's, on this machine: it cuts, stalls, lies and changes its files."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CURRENT = "2024_02"
MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"
PIECE = 1 << 14  # bytes sent at a time


@dataclass(frozen=True)
class File:
    content: bytes
    etag: str | None = '"1"'
    modified: str | None = MONDAY


@dataclass(frozen=True)
class Mood:
    """How one request for a file is answered; the default is honest."""

    cut_after: int | None = None  # bytes of the body, then the connection is closed
    stall_after: int | None = None  # bytes of the body, then silence
    trickle: float = 0.0  # seconds between two pieces
    piece: int = PIECE
    status: int | None = None  # answer with this and no file
    headers: dict[str, str] = field(default_factory=dict)  # added, or in place of the right ones
    ignore_range: bool = False
    chunked: bool = False  # no length is said
    body: bytes | None = None  # in place of the file
    extra: bytes = b""  # after the file, and counted in its length
    file: File | None = None  # answer with this one, as if it had just replaced the other
    drop: bool = False  # close without an answer


@dataclass
class Asked:
    """One request that came, and what it got."""

    path: str
    range: str | None
    if_range: str | None
    sent: int = 0  # bytes of the body


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.moods: dict[str, deque[Mood]] = {}  # of a path, one for each request; honest afterwards
        self.asked: list[Asked] = []
        self.released = threading.Event()  # ends every stall

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(
        self, folder: str, files: dict[str, bytes], release: str = CURRENT, promised: dict[str, bytes] | None = None
    ):
        """Files of one folder and their metalink, which promises ``promised`` in place of what is there."""
        for name, content in files.items():
            self.files[f"/{folder}/{name}"] = File(content)
        self.files[f"/{folder}/RELEASE.metalink"] = File(metalink({**files, **(promised or {})}, release))

    def mood(self, path: str, *moods: Mood) -> None:
        self.moods.setdefault(path, deque()).extend(moods)

    def of(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]

    def sent(self, path: str) -> int:
        return sum(asked.sent for asked in self.of(path))


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        asked = Asked(self.path, self.headers.get("Range"), self.headers.get("If-Range"))
        server.asked.append(asked)
        waiting = server.moods.get(self.path)
        mood = waiting.popleft() if waiting else Mood()
        self.close_connection = True
        if mood.drop:
            return
        file = mood.file or server.files.get(self.path)
        if mood.file:
            server.files[self.path] = mood.file
        if mood.status or file is None:
            self._answer(mood.status or 404, {"Content-Length": "0", **mood.headers})
            return
        content = file.content if mood.body is None else mood.body
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {"ETag": file.etag} if file.etag else {}
        headers |= {"Last-Modified": file.modified} if file.modified else {}
        first, status = 0, 200
        fits = asked.if_range in (None, file.etag, file.modified)
        if asked.range and fits and not mood.ignore_range:
            first, status = int(asked.range.removeprefix("bytes=").removesuffix("-")), 206
            if first >= len(content):
                self._answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[first:] + mood.extra
        headers |= {"Transfer-Encoding": "chunked"} if mood.chunked else {"Content-Length": str(len(body))}
        self._answer(status, headers | mood.headers)
        stop = min(x for x in (mood.cut_after, mood.stall_after, len(body)) if x is not None)
        try:
            for start in range(0, stop, mood.piece):
                piece = body[start : min(start + mood.piece, stop)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if mood.chunked else piece)
                self.wfile.flush()
                asked.sent += len(piece)
                if mood.trickle:
                    time.sleep(mood.trickle)
            if mood.chunked and stop == len(body):
                self.wfile.write(b"0\r\n\r\n")
            if mood.stall_after is not None:
                server.released.wait(60)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def metalink(files: dict[str, bytes], release: str = CURRENT, algorithm: str = "md5") -> bytes:
    """RELEASE.metalink as UniProt writes it."""
    entries = "".join(
        f"""    <file name="{name}">
      <size>{len(content)}</size>
      <verification>
        <hash type="{algorithm}">{hashlib.new(algorithm, content).hexdigest()}</hash>
      </verification>
      <resources>
        <url location="us" preference="100" type="ftp">ftp://ftp.uniprot.org/pub/databases/uniprot/{name}</url>
      </resources>
    </file>
"""
        for name, content in files.items()
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/">
  <identity>UniProt</identity>
  <publisher>
    <name>UniProt Consortium</name>
    <url>http://www.uniprot.org/</url>
  </publisher>
  <version>{release}</version>
  <files>
{entries}  </files>
</metalink>
""".encode()


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
