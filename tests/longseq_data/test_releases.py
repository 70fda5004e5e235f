"""Which file a name means, and what a release promises of it."""

from __future__ import annotations

import gzip
import json
import random
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from longseq_data.errors import DataError
from longseq_data.fetch.download import Patience
from longseq_data.fetch.releases import DATASETS, MIRRORS, fetch, parse_metalink
from longseq_data.readers.proteins import read_proteins
from uniprot_server import CURRENT, TUESDAY, File, Mood, Server, metalink, serve

QUICK = Patience(timeout=0.4, tries=2, first_wait=0.01, longest_wait=0.02)
CONTENT = random.Random(1).randbytes(100_003)
OTHER = random.Random(2).randbytes(100_103)
UNIREF = "current_release/uniref/uniref50"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        server.put(UNIREF, {"uniref50.fasta.gz": CONTENT, "uniref50.xml.gz": OTHER})
        yield server


@pytest.fixture
def get(server: Server, tmp_path: Path):
    def get(name: str = "uniref50", **settings: object):
        return fetch(name, tmp_path, **{"mirror": server.address, "patience": QUICK, **settings})

    return get


@pytest.mark.parametrize(
    ("name", "file_format", "path"),
    [
        ("uniref50", None, "current_release/uniref/uniref50/uniref50.fasta.gz"),
        ("uniref90", None, "current_release/uniref/uniref90/uniref90.fasta.gz"),
        ("uniref100", "xml", "current_release/uniref/uniref100/uniref100.xml.gz"),
        ("swissprot", None, "current_release/knowledgebase/complete/uniprot_sprot.fasta.gz"),
        ("swissprot", "dat", "current_release/knowledgebase/complete/uniprot_sprot.dat.gz"),
        ("trembl", "xml", "current_release/knowledgebase/complete/uniprot_trembl.xml.gz"),
    ],
)
def test_a_name_is_a_file_of_the_current_release(name: str, file_format: str, path: str, get, server: Server, tmp_path):
    folder, _, file = path.rpartition("/")
    server.put(folder, {file: CONTENT, "README": b"x"})
    fetched = get(name, file_format=file_format)
    assert fetched.path == tmp_path / file
    assert fetched.path.read_bytes() == CONTENT
    assert (fetched.url, fetched.release, fetched.size) == (f"{server.address}/{path}", CURRENT, len(CONTENT))
    assert (fetched.transferred, fetched.unpack) == (len(CONTENT), None)
    origin = json.loads((tmp_path / f"{file}.json").read_text())
    assert (origin["url"], origin["release"], origin["md5"]) == (fetched.url, CURRENT, fetched.checksum)


def test_the_mirrors_are_those_of_uniprot():
    assert MIRRORS.keys() == {"uniprot", "ebi", "expasy"}
    assert all(address.startswith("https://ftp.") and address.endswith("/uniprot") for address in MIRRORS.values())
    assert DATASETS.keys() == {"uniref50", "uniref90", "uniref100", "swissprot", "trembl"}


def test_a_second_call_transfers_nothing(get, server: Server):
    get()
    again = get(release=CURRENT)
    assert again.transferred == 0
    assert len(server.of(f"/{UNIREF}/uniref50.fasta.gz")) == 1


def test_the_next_release_does_not_replace_the_file_of_this_one(get, server: Server, tmp_path: Path):
    get()
    server.put(UNIREF, {"uniref50.fasta.gz": OTHER}, release="2024_03")
    with pytest.raises(DataError, match=r"uniref50\.fasta\.gz exists and is not the file of release 2024_03"):
        get()
    assert (tmp_path / "uniref50.fasta.gz").read_bytes() == CONTENT


def test_a_release_that_comes_out_on_the_way_is_fetched_whole(get, server: Server, tmp_path: Path):
    path = f"/{UNIREF}/uniref50.fasta.gz"
    said: list[str] = []

    def publish(done: int, total: int) -> None:
        if server.files[path].content is CONTENT and done > 40_000:
            server.files[path] = File(OTHER, '"2"', TUESDAY)
            server.files[f"/{UNIREF}/RELEASE.metalink"] = File(metalink({"uniref50.fasta.gz": OTHER}, "2024_03"))

    server.mood(path, Mood(cut_after=50_000))
    fetched = get(progress=publish, notice=said.append)
    assert (fetched.release, fetched.path.read_bytes()) == ("2024_03", OTHER)
    assert any("has changed; reading the release's metalink again" in sentence for sentence in said)


def test_a_file_touched_on_the_way_is_fetched_again(get, server: Server):
    path = f"/{UNIREF}/uniref50.fasta.gz"
    server.mood(path, Mood(cut_after=50_000), Mood(file=File(CONTENT, '"2"', TUESDAY)))
    assert get().path.read_bytes() == CONTENT


def test_a_metalink_that_does_not_fit_its_file_is_said(get, server: Server, tmp_path: Path):
    server.put(UNIREF, {"uniref50.fasta.gz": CONTENT}, promised={"uniref50.fasta.gz": OTHER})
    with pytest.raises(DataError) as caught:
        get()
    assert str(caught.value) == (
        f"{server.address}/{UNIREF}/uniref50.fasta.gz has 100,003 bytes, and the release's metalink says 100,103; the "
        f"mirror may be between two releases: run the same command again later, or with another mirror."
    )
    server.put(UNIREF, {"uniref50.fasta.gz": CONTENT}, promised={"uniref50.fasta.gz": bytes(len(CONTENT))})
    with pytest.raises(DataError, match="wrong checksum"):
        get()
    assert list(tmp_path.iterdir()) == []


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


def unpacked(fetched, folder: Path) -> Path:
    """What the printed command makes, with the shell's own tar."""
    import subprocess

    subprocess.run(fetched.unpack, shell=True, check=True, cwd=folder)
    return folder / fetched.unpack.split()[-1]


UNIREF_XML = gzip.compress(
    b"""<UniRef50 xmlns="http://uniprot.org/uniref"><entry id="UniRef50_Q1"><name>Cluster: a</name>
<representativeMember><dbReference type="UniProtKB ID" id="Q1_X"/><sequence length="2">AC</sequence>
</representativeMember></entry></UniRef50>"""
)


@pytest.mark.parametrize("previous", ["previous_releases", "previous_major_releases"])
def test_a_previous_uniref_is_an_archive_with_the_command_that_unpacks_it(
    previous, get, server: Server, tmp_path: Path
):
    inner = tar({"README": b"", "uniref50.xml.gz": UNIREF_XML})
    archive = tar({"uniref100.tar": b"", "uniref90.tar": b"", "uniref50.tar": inner}, "w:gz")
    server.put(f"{previous}/release-2021_02/uniref", {"uniref2021_02.tar.gz": archive}, "2021_02")
    fetched = get(release="2021_02")
    assert (fetched.path, fetched.release) == (tmp_path / "uniref2021_02.tar.gz", "2021_02")
    (record,) = read_proteins(str(unpacked(fetched, tmp_path)))
    assert record.description == "UniRef50_Q1 a RepID=Q1_X"
    with pytest.raises(DataError, match=r"\(uniref2021_02\.tar\.gz\) without uniref50\.fasta\.gz; it has xml\."):
        get(release="2021_02", file_format="fasta")


def test_a_previous_swissprot_is_an_archive_of_its_own(get, server: Server, tmp_path: Path):
    archive = tar({"uniprot_sprot.dat.gz": b"dat", "uniprot_sprot.fasta.gz": b"fasta"}, "w:gz")
    folder = "previous_releases/release-2021_02/knowledgebase"
    server.put(folder, {"knowledgebase2021_02.tar.gz": b"all", "uniprot_sprot-only2021_02.tar.gz": archive}, "2021_02")
    assert unpacked(get("swissprot", release="2021_02"), tmp_path).read_bytes() == b"fasta"
    dat = get("swissprot", release="2021_02", file_format="dat")
    assert (dat.transferred, unpacked(dat, tmp_path).read_bytes()) == (0, b"dat")


def test_a_previous_trembl_comes_with_the_whole_knowledgebase_where_it_has_no_archive(
    get, server: Server, tmp_path: Path
):
    archive = tar({"uniprot_sprot.dat.gz": b"sprot", "uniprot_trembl.dat.gz": b"trembl"}, "w:gz")
    server.put("previous_releases/release-2021_02/knowledgebase", {"knowledgebase2021_02.tar.gz": archive}, "2021_02")
    assert unpacked(get("trembl", release="2021_02"), tmp_path).read_bytes() == b"trembl"
    server.put("previous_releases/release-2021_03/knowledgebase", {"README": b"x"}, "2021_03")
    with pytest.raises(DataError, match="has no archive of uniprot_trembl with a size and a checksum, but README"):
        get("trembl", release="2021_03")


def test_a_release_that_is_not_there_is_said_with_the_one_that_is(get, server: Server):
    with pytest.raises(DataError) as caught:
        get(release="2019_11")
    assert str(caught.value) == (
        f"{server.address} has no release 2019_11; the current one is {CURRENT}; the previous ones are listed at "
        f"{server.address}/previous_releases/, and no server keeps all of them."
    )


def test_a_folder_with_the_metalink_of_another_release_is_refused(get, server: Server):
    server.put("previous_releases/release-2021_02/uniref", {"uniref2021_02.tar.gz": b"x"}, "2021_03")
    with pytest.raises(DataError, match=r"RELEASE\.metalink is that of release 2021_03; choose that release"):
        get(release="2021_02")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "uniprot"},
            "'uniprot' is no data set of UniProt; give uniref50, uniref90, uniref100, swissprot",
        ),
        ({"file_format": "dat"}, "uniref50 has no format 'dat'; it has fasta or xml."),
        ({"release": "latest"}, "release 'latest': no such name; give 'current' or a version such as 2024_01."),
        ({"release": "../x"}, "no such name; give 'current'"),
        ({"mirror": "embl"}, "mirror 'embl': neither uniprot, ebi or expasy nor the http"),
        ({"mirror": "ftp://ftp.uniprot.org/pub"}, "nor the http"),
        ({"mirror": "http://a b/c"}, "nor the http"),
        ({"mirror": ""}, "nor the http"),
    ],
)
def test_what_does_not_exist_is_said_before_any_server_is_asked(settings, message: str, get, server: Server):
    with pytest.raises(DataError) as caught:
        get(**settings)
    assert message in str(caught.value)
    assert server.asked == []


GOOD = metalink({"uniref50.fasta.gz": CONTENT})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"<!DOCTYPE html><html></html>", ": a web page and no metalink; a proxy or a login may be in the way"),
        (b"<html></html>", ": no metalink (<html>); check the address of the mirror."),
        (b"", ", line 1: a damaged metalink (no element found); run the same command"),
        (GOOD[: len(GOOD) // 2], ": a damaged metalink (unclosed token); run the same"),
        (
            GOOD.replace(b"uniref50.fasta.gz", b"other.gz"),
            "RELEASE.metalink has no size and checksum of uniref50",
        ),
        (GOOD.replace(b"<size>", b"<size>-"), "RELEASE.metalink has no size and checksum of uniref50.fasta.gz, so it"),
        (GOOD.replace(b'type="md5"', b'type="crc"'), "RELEASE.metalink has no size and checksum of uniref50.fasta.gz"),
        (GOOD.replace(b'<hash type="md5">', b'<hash type="md5">g'), "RELEASE.metalink has no size and checksum of"),
        (b'<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><metalink>&x;</metalink>', ": a web page and no met"),
    ],
)
def test_a_metalink_that_is_none_is_said(document: bytes, message: str, get, server: Server, tmp_path: Path):
    server.files[f"/{UNIREF}/RELEASE.metalink"] = File(document)
    with pytest.raises(DataError) as caught:
        get()
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{server.address}/{UNIREF}/RELEASE.metalink")
    assert list(tmp_path.iterdir()) == []


def test_the_strongest_checksum_counts(get, server: Server, tmp_path: Path):
    both = GOOD.replace(b"</hash>", b'</hash><hash type="sha-256">%s</hash>' % (b"0" * 64))
    _, promises = parse_metalink(both, "x")
    assert promises["uniref50.fasta.gz"].algorithm == "sha256"
    server.files[f"/{UNIREF}/RELEASE.metalink"] = File(metalink({"uniref50.fasta.gz": CONTENT}, algorithm="sha256"))
    assert get().algorithm == "sha256"
    release, promises = parse_metalink(GOOD.replace(b' xmlns="http://www.metalinker.org/"', b""), "x")
    assert (release, promises["uniref50.fasta.gz"].size) == (CURRENT, len(CONTENT))
