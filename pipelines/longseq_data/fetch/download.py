"""One large file over HTTP: resumed where it was cut, checked before it gets its name.

urllib does it, as one transfer from front to back needs no event loop, and the
timeout of its socket is the limit for silence.
"""

from __future__ import annotations

import errno
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from longseq_data.errors import DataError
from longseq_data.os_errors import explained

from .partial import Notice, Part, Progress, Promise, check_existing, locked, need_room

READ = 1 << 20  # bytes at a time
SLOWEST = 1024  # bytes per second, over the time of a timeout; less is as good as silence
MAX_DOCUMENT = 1 << 24  # bytes of a file that is read into memory
_OF_THIS_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of a socket: no wait helps


@dataclass(frozen=True)
class Patience:
    """How long a server may take."""

    timeout: float = 60.0  # seconds: to connect, and of silence
    tries: int = 8  # in a row that bring nothing new
    first_wait: float = 1.0  # seconds between two tries, doubled each time
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout < 86400:
            raise DataError(f"a timeout of {self.timeout:g} seconds: give more than 0 and less than a day.")
        if self.tries < 1:
            raise DataError(f"{self.tries} tries are none; give at least 1.")


class ChangedError(Exception):
    """The server has another file under this address than was promised; the message is what is different."""


class MissingError(DataError):
    """The server has no such file (404 or 410)."""


class _RefusedError(Exception):
    """The server refused a request in a way that may pass; the message says how."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait  # seconds that the server asks for


def download(
    url: str,
    path: Path,
    promise: Promise,
    *,
    patience: Patience | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> int:
    """Get ``url`` as ``path``, going on with what an earlier call has left in ``path``.part; bytes transferred.

    A file that is there and as promised is not transferred again. A cut, silent or busy connection is tried again.

    Raises DataError when the server cannot or will not give the promised bytes, for a full disk, for another process at
    work on the same file, and for another file under that name: FILE.part is then kept wherever going on makes sense.
    Raises ChangedError when the server's file has another size than was promised. KeyboardInterrupt keeps the part.
    """
    patience, progress, notice = patience or Patience(), progress or _ignore, notice or _ignore
    with locked(path, notice) as file:
        if path.exists():
            check_existing(path, promise, progress)
            return 0
        part = Part(path, file, promise)
        try:
            if not part.go_on(progress) and part.size:
                notice(f"{part.path} is no part of this file (release {promise.release}); starting from the beginning.")
                part.restart()
            need_room(part)
            transferred = _transfer(part, url, patience, progress, notice)
        except KeyboardInterrupt:
            notice(f"Stopped: {part.kept()}; run the same command again: it goes on there.")
            raise
        part.publish(url)
    return transferred


def read_document(url: str, *, patience: Patience | None = None, notice: Notice | None = None) -> bytes:
    """A small file, at most 16 MiB, with the same patience. Raises DataError; MissingError where there is none."""
    patience, notice = patience or Patience(), notice or _ignore
    for attempt in range(1, patience.tries + 1):
        try:
            with _open(url, {}, patience.timeout) as response:
                length = response.headers.get("Content-Length", "")
                document = b""
                for piece in _pieces(response, patience.timeout):
                    document += piece
                    if len(document) > MAX_DOCUMENT:
                        raise DataError(f"{url}: more than 16 MiB, so no metalink; check the address of the mirror.")
            if not length.isdigit() or int(length) == len(document):
                return document
            problem: Exception = _RefusedError("the connection was cut")
        except (_RefusedError, OSError, http.client.HTTPException) as error:
            problem = error
        if attempt < patience.tries:
            _wait(patience, attempt, problem, "", notice)
    raise DataError(f"{url}: {_said(problem)}; check the connection, or name another mirror.")


def _transfer(part: Part, url: str, patience: Patience, progress: Progress, notice: Notice) -> int:
    """Fill the part up to the promised size; bytes transferred."""
    most, failures, transferred = part.size, 0, 0
    conditional = True
    while part.size < part.promise.size:
        problem: Exception = _RefusedError("the connection was cut")
        try:
            with _request(part, url, patience, conditional) as response:
                if not _fit(part, url, response, conditional, notice):
                    conditional = False
                    continue
                conditional = True
                for piece in _pieces(response, patience.timeout):
                    transferred += len(piece)
                    if part.size + len(piece) > part.promise.size:
                        part.restart()
                        raise DataError(
                            f"{url}: the server sends more than the {part.promise.size:,} bytes that the release's "
                            f"metalink says; nothing was kept; try again later, or name another mirror."
                        )
                    part.append(piece)
                    progress(part.size, part.promise.size)
        except (_RefusedError, OSError, http.client.HTTPException) as error:
            problem = error
        failures = 0 if part.size > most else failures + 1
        most = max(most, part.size)
        if failures >= patience.tries:
            keeps = f"; {part.kept()}" if part.size else ""
            raise DataError(
                f"{url}: {_said(problem)}, {failures} times in a row{keeps}; check the connection, or name another "
                f"mirror, and run the same command again: it goes on where it stopped."
            )
        if part.size < part.promise.size:
            _wait(patience, max(failures, 1), problem, f" after {part.size:,} bytes", notice)
    return transferred


def _request(part: Part, url: str, patience: Patience, conditional: bool) -> http.client.HTTPResponse:
    headers = {}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        known = part.conditions_at(url)
        validator = known.get("ETag", "")
        if not validator or validator.startswith("W/"):  # If-Range takes no weak one
            validator = known.get("Last-Modified", "")
        if validator and conditional:
            headers["If-Range"] = validator
    return _open(url, headers, patience.timeout)


def _fit(part: Part, url: str, response: http.client.HTTPResponse, conditional: bool, notice: Notice) -> bool:
    """Bring the part to where the response begins. False: ask again, without a condition."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise DataError(
            f"{url}: the answer is a web page, not the file; a proxy or a login may be in the way: open the address in "
            f"a browser, or name another mirror."
        )
    whole = response.status != http.HTTPStatus.PARTIAL_CONTENT
    total = headers.get("Content-Length", "")
    if not whole:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != part.size:
            part.restart()
            raise _RefusedError("the server answered with another range than it was asked for")
        total = found[2]
    elif part.size and (known := part.conditions_at(url)):
        dated = "Last-Modified" in known and known["Last-Modified"] == headers.get("Last-Modified")
        tagged = "ETag" in known and known["ETag"] == headers.get("ETag")
        if dated and not tagged and conditional:
            return False  # one of several servers behind one name, with tags of its own: the checksum will tell
        if not dated and not tagged and len(known) > 1:
            part.restart()
            raise ChangedError(f"{url} has changed")
    if total.isdigit() and int(total) != part.promise.size:
        raise ChangedError(f"{url} has {int(total):,} bytes, and the release's metalink says {part.promise.size:,}")
    if whole and part.size:
        notice(f"{url}: the server cannot go on in the middle of a file; starting from the beginning.")
        part.restart()
    part.note(url, headers)
    return True


def _pieces(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """What the response brings, up to its end or its cut. TimeoutError where next to nothing comes."""
    since, received = time.monotonic(), 0
    while piece := response.read1(READ):
        yield piece
        received += len(piece)
        elapsed = time.monotonic() - since
        if elapsed > timeout:
            if received < SLOWEST * elapsed:
                raise TimeoutError
            since, received = time.monotonic(), 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to HTTP only, and never from an encrypted connection to one that is not."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            raise DataError(f"{req.full_url}: redirected to {newurl}, which is less safe; name another mirror.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _open(url: str, headers: Mapping[str, str], timeout: float) -> http.client.HTTPResponse:
    """A response of status 200 or 206. Raises _RefusedError or OSError where trying again may help, else DataError."""
    opener = urllib.request.build_opener(_Redirects)
    try:
        request = urllib.request.Request(
            url, headers={"User-Agent": "longseq", "Accept-Encoding": "identity", **headers}
        )
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise _status_error(url, error.code, error.headers) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(
                f"{url}: the server's certificate is not trusted ({error.reason.verify_message}); check the clock and "
                f"the proxy of this machine, or name another mirror."
            ) from error
        _refuse_here(url, error.reason)
        raise
    except OSError as error:
        _refuse_here(url, error)
        raise
    except (ValueError, http.client.InvalidURL) as error:
        raise DataError(f"{url}: no address that can be opened ({error}); correct it.") from error
    if response.status not in (200, 206):
        response.close()
        raise _RefusedError(f"the server answered {response.status}")
    return response


def _refuse_here(url: str, reason: object) -> None:
    """Raise DataError for what this machine refuses. TLS has error numbers of its own."""
    if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError) and reason.errno in _OF_THIS_MACHINE:
        raise DataError(f"{explained(reason, url, 'no connection can be made')}.") from reason


def _status_error(url: str, status: int, headers: Message) -> Exception:
    name = http.client.responses.get(status, "unknown status")
    if status in (404, 410):
        return MissingError(f"{url}: not found on the server ({status} {name}); check the release and the mirror.")
    if status == 416:
        return ChangedError(f"{url} is shorter than the release's metalink says")
    if status in (408, 425, 429) or status >= 500:
        after = headers.get("Retry-After", "")
        return _RefusedError(
            f"the server is busy or broken ({status} {name})", min(float(after), 300.0) if after.isdigit() else None
        )
    if 300 <= status < 400:
        return DataError(f"{url}: redirected in a circle, or away from HTTP; name another mirror.")
    return DataError(f"{url}: refused by the server ({status} {name}); check the address, or name another mirror.")


def _wait(patience: Patience, failures: int, problem: Exception, where: str, notice: Notice) -> None:
    seconds = min(patience.first_wait * 2 ** (failures - 1), patience.longest_wait)
    if isinstance(problem, _RefusedError) and problem.wait is not None:
        seconds = problem.wait
    notice(f"{_said(problem)}{where}; trying again in {seconds:.0f} s.")
    time.sleep(seconds)


def _said(problem: Exception) -> str:
    reason = problem.reason if isinstance(problem, urllib.error.URLError) else problem
    if isinstance(reason, TimeoutError):
        return "the server was silent for too long"
    if isinstance(reason, ConnectionRefusedError):
        return "the server refuses connections"
    if isinstance(reason, (ConnectionError, http.client.IncompleteRead, http.client.RemoteDisconnected)):
        return "the connection was cut"
    if isinstance(reason, OSError) and reason.strerror:
        return f"no connection ({reason.strerror})"  # an unknown host name, too
    return " ".join(str(reason).split()) or type(reason).__name__


def _ignore(*_: object) -> None:
    pass
