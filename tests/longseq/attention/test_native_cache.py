"""Where the compiled C++ kernels are kept, and what is never loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longseq.attention.backends.native import build

needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=f"no native kernels: {build.unavailable()}")

PROGRAM = """
import torch
from longseq.attention import favor_attention
from longseq.attention.backends.native import build
q = torch.ones(1, 1, 4, 8)
print(float(favor_attention(q, q, q, causal=True).sum()), build.unavailable())
"""


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A fresh Python with an empty cache of compiled kernels."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    return out.strip()


def script(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (None, "was not found"),
        ("echo clang version 19", "is not GCC"),
        ('case "$*" in *version*) echo Free Software Foundation;; *) echo error: full >&2; exit 1;; esac', "full"),
        ("exit 1", "failed"),
    ],
)  # fmt: skip
def test_without_a_working_compiler_attention_goes_on_in_pytorch(lines, reason, tmp_path):
    compiler = script(tmp_path / "g++", lines) if lines else str(tmp_path / "missing")
    printed = said(start(tmp_path, CXX=compiler))
    assert printed.startswith("32.0 ")
    assert reason in printed


def counting_compiler(tmp_path: Path) -> str:
    """The machine's compiler, which counts in ``compiled`` how often it compiles, without optimizing."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    count = f'case " $* " in *" -c "*) echo x >> {tmp_path}/compiled;; esac'
    return script(tmp_path / "logged-g++", f'{count}; exec {compiler} "$@" -O0')


def times_compiled(tmp_path: Path) -> int:
    return len((tmp_path / "compiled").read_text().split())


@needs_compiler
def test_processes_that_start_at_once_compile_once(tmp_path):
    compiler = counting_compiler(tmp_path)
    assert [said(p) for p in [start(tmp_path, CXX=compiler) for _ in range(2)]] == ["32.0 None"] * 2
    assert times_compiled(tmp_path) == 1


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, which compiles at once; its cache is empty. Returns where it will be kept."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "kernels.cpp").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build, "_SOURCES", tmp_path / "sources")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", counting_compiler(tmp_path))
    monkeypatch.setattr(build, "_flags", lambda: ("-fPIC",))
    return tmp_path / "cache" / "longseq" / build._Recipe.of_this_machine().name


def answer() -> int:
    return build._loaded(build._Recipe.of_this_machine()).answer()


@needs_compiler
@pytest.mark.parametrize("damage", ["half", "one byte", "empty", "garbage", "writable by others", "another user's"])
def test_a_library_that_is_not_as_it_was_written_is_compiled_again_once(damage, small, tmp_path):
    assert answer() == 42
    whole = small.read_bytes()
    middle = len(whole) // 2
    if damage == "writable by others":
        small.chmod(0o666)
    elif damage == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(small, 65534, 65534)
    else:
        changed = {
            "half": whole[:middle],
            "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "garbage": b"no library",
        }
        small.unlink()  # what this process has loaded stays as it is
        small.write_bytes(changed[damage])
    assert [answer(), answer()] == [42, 42]
    assert times_compiled(tmp_path) == 2
    assert small.read_bytes() == whole
    assert small.stat().st_mode & 0o777 == 0o755
    assert small.stat().st_uid == os.geteuid()


PLANTED = '#include <stdio.h>\n__attribute__((constructor)) static void run() { fclose(fopen("%s", "w")); }'


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_code_that_somebody_planted_in_the_cache_does_not_run(mode, small, tmp_path):
    source, ran = tmp_path / "planted.c", tmp_path / "ran"
    source.write_text(PLANTED % ran)
    small.parent.mkdir(parents=True)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(small)], check=True)
    small.chmod(mode)
    small.parent.chmod(mode)
    assert answer() == 42
    assert not ran.exists()
    assert small.parent.stat().st_mode & 0o022 == 0


@needs_compiler
def test_where_the_cache_cannot_be_written_the_temporary_folder_keeps_the_library(small, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    assert [answer(), answer()] == [42, 42]
    kept = tmp_path / "tmp" / f"longseq-{os.geteuid()}"
    assert f"kept in {kept} ({tmp_path}/cache/longseq: Not a directory)" in caplog.text
    assert times_compiled(tmp_path) == 1


@needs_compiler
def test_where_nothing_can_be_kept_the_library_is_compiled_for_the_process(small, tmp_path, caplog):
    for blocked in (tmp_path / "cache", tmp_path / "tmp" / f"longseq-{os.geteuid()}"):
        blocked.write_text("no folder")
    assert [answer(), answer()] == [42, 42]
    assert times_compiled(tmp_path) == 2
    assert "compiled at every start" in caplog.text


@needs_compiler
def test_a_full_home_does_not_cost_the_kernels(tmp_path):
    """The compiler itself meets the full disk first."""
    full = tmp_path / "cache"
    full.mkdir()
    (tmp_path / "tmp").mkdir()
    script_ = 'mount -t tmpfs -o size=64k tmpfs "$1" || exit 77; shift; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script_, "sh", str(full), sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "XDG_CACHE_HOME": str(full), "TMPDIR": str(tmp_path / "tmp")}
    environment["CXX"] = counting_compiler(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode in (1, 77) and "32.0" not in done.stdout:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.strip() == "32.0 None"
    assert "No space left on device" in done.stderr


@needs_compiler
def test_compilers_of_one_version_have_libraries_of_their_own(small, monkeypatch, tmp_path):
    names = {small.name}
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("CXX", counting_compiler(tmp_path / "other"))
    assert build._Recipe.of_this_machine().name not in names
