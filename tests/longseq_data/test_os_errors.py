"""What the operating system refuses: by real refusals where they can be had, else by its number."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from longseq_data.os_errors import explained, is_full, lock, of_library


def refused(act) -> str:
    with pytest.raises(OSError, match="Errno") as raised:
        act()
    return explained(raised.value)


def test_real_refusals_name_path_reason_and_what_to_do(tmp_path: Path):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("")
    loop.symlink_to(loop)
    long = tmp_path / ("n" * 300)
    for path, reason, remedy in (
        (tmp_path / "none", "No such file or directory", "correct the path"),
        (tmp_path, "Is a directory", "it is a folder; give a file"),
        (file / "below", "Not a directory", "a part of this path is a file; correct the path"),
        (loop, "Too many levels of symbolic links", "its links lead back to themselves; correct or remove them"),
        (long, "File name too long", "choose a shorter name, or a folder less deep"),
    ):
        assert refused(path.read_text) == f"{path}: {reason}; {remedy}"


def test_too_many_open_files_are_no_matter_of_room(tmp_path: Path):
    (tmp_path / "file").write_text("")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            held.extend(os.open(tmp_path / "file", os.O_RDONLY) for _ in range(257))
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in explained(raised.value)
    assert "raise the limit (ulimit -n)" in explained(raised.value)
    assert not is_full(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_a_permission_is_never_a_matter_of_room(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("")
    secret.chmod(0)
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; from longseq_data.os_errors import explained; os.setuid(65534)\n"
        "try: open(sys.argv[1])\nexcept OSError as error: print(explained(error))"
    )
    done = subprocess.run([sys.executable, "-c", program, secret, *sys.path], capture_output=True, text=True)
    assert done.stdout == (
        f"{secret}: Permission denied; have its owner give this user the right (chmod, chown), or choose another path\n"
    ), done.stderr


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_only_missing_room_is_answered_by_making_room(number: int):
    sentence = explained(OSError(number, os.strerror(number), "the/path"))
    assert sentence.startswith(f"the/path: {os.strerror(number)}; ")
    assert ("make room" in sentence) == (number == errno.ENOSPC)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "quota raised"),
        (errno.EROFS, "mounted read-only"),
        (errno.EPERM, "the mount forbid it"),
        (errno.ESTALE, "mount it anew"),
        (errno.EIO, "dmesg"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOLCK, "gives no locks"),
    ],
)
def test_refusals_that_cannot_be_had_here_are_told_apart(number: int, words: str):
    assert words in explained(OSError(number, os.strerror(number)), "p", "cannot be written")


def test_words_of_a_library_become_the_error_that_they_are_about():
    found = of_library(Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "w")
    assert found is not None
    assert (found.errno, found.filename) == (errno.ENOSPC, "w")
    assert of_library(Exception("invalid header"), "w") is None


def test_a_lock_that_another_has_is_refused_and_one_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch):
    path = tmp_path / "lock"
    said: list[str] = []
    with path.open("a") as first, path.open("a") as second:
        lock(first, path, said.append)
        with pytest.raises(BlockingIOError):
            lock(second, path, said.append)
        assert said == []

        def without(number: int):
            def flock(*_: object) -> None:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(fcntl, "flock", flock)

        for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            without(number)
            lock(second, path, said.append)
        assert len(said) == 3
        assert said[0].startswith(f"{path}: no locks on this file system (No locks available)")
        without(errno.EIO)
        with pytest.raises(OSError, match=r"put/output error"):
            lock(second, path, said.append)
