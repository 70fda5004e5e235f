"""What libraries find in the environment of a job's processes, and that the user's own settings stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longseq.launch import local
from longseq.launch.gpu_settings import gpu_settings, recorder_settings, where_traces_are


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"longseq-triton-{os.geteuid()}"


def test_a_process_of_a_training_finds_the_settings(temporary, run):
    run = run.begin("process 1")
    found = local.environment_of(0, 2, 29999) | recorder_settings({}, run)
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TRITON_CACHE_DIR"] == str(temporary)
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert found["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    # NCCL appends the rank.
    assert (
        f"{found['TORCH_NCCL_DEBUG_INFO_TEMP_FILE']}1"
        == str(run.trace_of(1))
        == f"{run.starts_dir}/00001.collectives-1"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:128"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128"),
        ("TRITON_CACHE_DIR", "/fast/triton"),
    ],
)
def test_the_users_settings_stay(temporary, name, value):
    settings = gpu_settings({name: value})
    assert name not in settings
    assert ("PYTORCH_ALLOC_CONF" in settings) == (name == "TRITON_CACHE_DIR")


def test_the_users_recorder_stays(run):
    given = {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "/fast/trace"}
    assert recorder_settings(given, run) == {}
    assert "TORCH_FR_BUFFER_SIZE" not in recorder_settings({"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}, run)


def test_kernels_are_not_kept_where_others_may_write(temporary):
    temporary.mkdir()
    temporary.chmod(0o777)
    assert "TRITON_CACHE_DIR" not in gpu_settings({})
    temporary.rmdir()
    temporary.symlink_to(temporary.parent)
    assert "TRITON_CACHE_DIR" not in gpu_settings({})


def test_the_traces_of_a_start_are_named_in_the_sentence(run):
    run = run.begin("process 1")
    assert where_traces_are(run) == ""
    run.trace_of(1).write_bytes(b"")
    assert where_traces_are(run) == (
        f" What each rank's last collectives were: `torchfrtrace --prefix 00001.collectives- {run.starts_dir}`."
    )
