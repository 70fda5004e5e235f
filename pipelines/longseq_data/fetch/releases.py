"""UniProt's releases: which file of which server a name means, and what the release says of it.

Every folder of a release has a RELEASE.metalink (Metalink 3.0, XML) with the size and the checksum of each of its
files. The current release has a file for each format; of previous ones there are archives only (``ARCHIVES``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

from longseq_data.errors import DataError

from .download import ChangedError, MissingError, Patience, download, read_document
from .partial import Notice, Progress, Promise

MIRRORS = {
    "uniprot": "https://ftp.uniprot.org/pub/databases/uniprot",
    "ebi": "https://ftp.ebi.ac.uk/pub/databases/uniprot",
    "expasy": "https://ftp.expasy.org/databases/uniprot",
}
PREVIOUS = ("previous_releases", "previous_major_releases")  # the folder's name has changed
RELEASE = re.compile(r"[0-9]{4}_[0-9]{2}")

METALINK = "RELEASE.metalink"
Read = Callable[[str], tuple[str, dict[str, Promise]]]  # what the metalink of a folder says

ALGORITHMS = {"sha512": 128, "sha256": 64, "sha1": 40, "md5": 32}  # hexadecimal digits; the strongest first


@dataclass(frozen=True)
class DataSet:
    """Where a release has the files of a name."""

    folder: str
    stem: str
    formats: tuple[str, ...]  # of the current release; the first is the default
    archives: tuple[tuple[str, tuple[str, ...]], ...]  # of a previous one, best first, and the formats inside


def _uniref(percent: int) -> DataSet:
    # the archive holds uniref100.tar, uniref90.tar and uniref50.tar, and these the XML
    return DataSet(
        f"uniref/uniref{percent}", f"uniref{percent}", ("fasta", "xml"), (("uniref{release}.tar.gz", ("xml",)),)
    )


DATASETS = {
    "uniref50": _uniref(50),
    "uniref90": _uniref(90),
    "uniref100": _uniref(100),
    "swissprot": DataSet(
        "knowledgebase/complete",
        "uniprot_sprot",
        ("fasta", "dat", "xml"),
        (
            ("uniprot_sprot-only{release}.tar.gz", ("fasta", "dat", "xml")),
            ("knowledgebase{release}.tar.gz", ("dat", "xml")),
        ),
    ),
    "trembl": DataSet(
        "knowledgebase/complete",
        "uniprot_trembl",
        ("fasta", "dat", "xml"),
        (("uniprot_trembl-only{release}.tar.gz", ("dat", "xml")), ("knowledgebase{release}.tar.gz", ("dat", "xml"))),
    ),
}


@dataclass(frozen=True)
class Fetched:
    """A file that is there, whole and as its release says."""

    path: Path
    url: str
    release: str
    size: int  # bytes
    algorithm: str
    checksum: str
    transferred: int  # bytes that this call took from the server; 0: the file was there
    unpack: str | None  # of an archive: the shell command that takes the wanted file out of it


@dataclass(frozen=True)
class _Source:
    """A file of a release."""

    url: str
    promise: Promise
    unpack: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(
    name: str,
    folder: Path,
    *,
    release: str = "current",
    file_format: str | None = None,
    mirror: str = "uniprot",
    patience: Patience | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Fetched:
    """Get a data set of UniProt into ``folder``, under the name that it has on the server.

    name: a key of DATASETS.
    release: "current", or a version such as "2024_01". A previous release exists as a .tar.gz archive of several files:
        that is fetched, and ``unpack`` of the result says how to go on. Those of UniRef and TrEMBL hold no FASTA.
    file_format: "fasta", "dat" (UniProtKB only) or "xml"; None: FASTA, or whatever a previous release has.
    mirror: a key of MIRRORS, or the address of a server with the same layout.

    Raises DataError: see ``download``; and for a name, release, format or mirror that does not exist, and for a release
    whose metalink does not say size and checksum.
    """
    if name not in DATASETS:
        raise DataError(f"'{name}' is no data set of UniProt; give {_listed(tuple(DATASETS))}.")
    data_set, base = DATASETS[name], _base(mirror)
    if file_format is not None and file_format not in data_set.formats:
        raise DataError(f"{name} has no format '{file_format}'; it has {_listed(data_set.formats)}.")
    if release != "current" and not RELEASE.fullmatch(release):
        raise DataError(f"release '{release}': no such name; give 'current' or a version such as 2024_01.")
    read = partial(_metalink, patience, notice)
    failed = None  # what was asked for when the server had something else
    for _ in range(4):  # a new release may come out while the file is on its way
        source = _find(data_set, base, release, file_format, read)
        path = folder / source.name
        try:
            transferred = download(
                source.url, path, source.promise, patience=patience, progress=progress, notice=notice
            )
        except ChangedError as error:
            if source == failed:  # with the release's promise read anew
                raise DataError(
                    f"{error}; the mirror may be between two releases: run the same command again later, or with "
                    f"another mirror."
                ) from error
            if notice:
                notice(f"{error}; reading the release's metalink again.")
            failed = source
            continue
        said = source.promise
        sizes = said.size, said.algorithm, said.checksum
        fetched = Fetched(path, source.url, said.release, *sizes, transferred, source.unpack)
        _note_origin(fetched)
        return fetched
    raise DataError(f"{base}: its files keep changing; run the same command again later, or with another mirror.")


def parse_metalink(document: bytes, url: str) -> tuple[str, dict[str, Promise]]:
    """(release, what is promised of each file that has a size and a checksum). DataError for what is no metalink."""
    if b"<!DOCTYPE" in document:
        raise DataError(
            f"{url}: a web page and no metalink; a proxy or a login may be in the way: open it in a browser."
        )
    try:
        root = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise DataError(
            f"{url}, line {error.position[0]}: a damaged metalink ({str(error).partition(':')[0]}); run the same "
            f"command again later, or with another mirror."
        ) from error
    if root.tag.rpartition("}")[2] != "metalink":
        raise DataError(f"{url}: no metalink (<{root.tag.rpartition('}')[2][:40]}>); check the address of the mirror.")
    namespace = root.tag[: root.tag.find("}") + 1]
    release = (root.findtext(f"{namespace}version") or "").strip()
    promises = {}
    for file in root.iter(f"{namespace}file"):
        size = (file.findtext(f"{namespace}size") or "").strip()
        sums = {
            (found.get("type") or "").lower().replace("-", ""): (found.text or "").strip().lower()
            for found in file.iter(f"{namespace}hash")
        }
        algorithm = next((known for known in ALGORITHMS if known in sums), None)
        if not algorithm or not re.fullmatch(f"[0-9a-f]{{{ALGORITHMS[algorithm]}}}", sums[algorithm]):
            continue
        if re.fullmatch("[0-9]{1,18}", size):
            promises[file.get("name", "")] = Promise(int(size), algorithm, sums[algorithm], release)
    return release, promises


def _find(data_set: DataSet, base: str, release: str, file_format: str | None, read: Read) -> _Source:
    """The file that is meant, and what its release promises. DataError where there is none."""
    folder = f"{base}/current_release/{data_set.folder}"
    current = None
    try:
        current, promises = read(folder)
    except MissingError:
        if release == "current":
            raise
    if current is not None and release in ("current", current):
        file = f"{data_set.stem}.{file_format or data_set.formats[0]}.gz"
        if file not in promises:
            raise DataError(
                f"{folder}/{METALINK} has no size and checksum of {file}, so it could not be checked; name another "
                "mirror."
            )
        return _Source(f"{folder}/{file}", promises[file])
    return _find_archive(data_set, base, release, current, file_format, read)


def _find_archive(
    data_set: DataSet, base: str, release: str, current: str | None, file_format: str | None, read: Read
) -> _Source:
    for previous in PREVIOUS:
        folder = f"{base}/{previous}/release-{release}/{data_set.folder.partition('/')[0]}"
        try:
            said, promises = read(folder)
            break
        except MissingError:
            continue
    else:
        now = f"; the current one is {current}" if current else ""
        raise DataError(
            f"{base} has no release {release}{now}; the previous ones are listed at {base}/{PREVIOUS[0]}/, and no "
            f"server keeps all of them."
        )
    if said and said != release:
        raise DataError(f"{folder}/{METALINK} is that of release {said}; choose that release, or another mirror.")
    for name, formats in data_set.archives:
        archive = name.format(release=release)
        if archive not in promises:
            continue
        if file_format is not None and file_format not in formats:
            raise DataError(
                f"Release {release} is an archive ({archive}) without {data_set.stem}.{file_format}.gz; it has "
                f"{_listed(formats)}."
            )
        member = f"{data_set.stem}.{file_format or formats[0]}.gz"
        unpack = f"tar -xf {archive} {member}"
        if data_set.stem.startswith("uniref"):
            unpack = f"tar -xOf {archive} {data_set.stem}.tar | tar -xf - {member}"
        return _Source(f"{folder}/{archive}", replace(promises[archive], release=release), unpack)
    raise DataError(
        f"{folder}: release {release} has no archive of {data_set.stem} with a size and a checksum, but "
        f"{_listed(sorted(promises)) or 'nothing'}; choose another release or mirror."
    )


def _metalink(patience: Patience | None, notice: Notice | None, folder: str) -> tuple[str, dict[str, Promise]]:
    url = f"{folder}/{METALINK}"
    return parse_metalink(read_document(url, patience=patience, notice=notice), url)


def _base(mirror: str) -> str:
    base = MIRRORS.get(mirror, mirror).rstrip("/")
    address = urlsplit(base)
    if address.scheme not in ("http", "https") or not address.hostname or re.search(r"[\s?#]", base):
        raise DataError(f"mirror '{mirror}': neither {_listed(tuple(MIRRORS))} nor the http(s) address of a server.")
    return base


def _note_origin(fetched: Fetched) -> None:
    """FILE.json: where a file came from, for the reader of a folder in a year's time."""
    path = fetched.path.with_name(f"{fetched.path.name}.json")
    if fetched.transferred or not path.exists():
        origin = {
            "url": fetched.url,
            "release": fetched.release,
            "size": fetched.size,
            fetched.algorithm: fetched.checksum,
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path.write_text(json.dumps(origin, indent=1) + "\n")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    *before, last = names or ("",)
    return f"{', '.join(before)} or {last}" if before else last
