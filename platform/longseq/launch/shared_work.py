"""What the words of a verb mean to a job whose nodes share its work. No torch here."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from longseq.errors import ConfigError, RunError
from longseq.output_files import check_output, shards_of
from longseq.runs.run import Run

SHARED = ("embed", "score", "benchmark")
_EXAMPLES = {
    "embed": "`longseq submit RUN --job embed -- proteins.fasta --out vectors.parquet`",
    "score": "`longseq submit RUN --job score -- proteins.fasta --out scores.tsv`",
    "benchmark": "`longseq submit RUN --job benchmark -- proteingym FOLDER`",
}


def words_of(verb: str, model: Path, words: Sequence[str]) -> list[str]:
    """The command of the job: the model stands behind the file, or of a benchmark behind its name and file.

    Raises:
        ConfigError: where the file is not named first.
    """
    before = 2 if verb == "benchmark" else 0
    named = words[: before or 1]
    if len(named) < (before or 1) or any(word.startswith("-") or "=" in word for word in named):
        what = "the benchmark's name and file" if before else "the file"
        raise ConfigError(f"--job={verb}: name {what} first, behind `--`: {_EXAMPLES[verb]}.")
    return [verb, *words[:before], str(model), *words[before:]]


def keys_of(words: Sequence[str]) -> tuple[str, ...]:
    """The section.key=value among the words."""
    return tuple(word for word in words if "." in word.partition("=")[0] and "=" in word and word[0] != "-")


def check_writable(run: Run) -> None:
    """Refuse another's run: a job's script, log and code are kept in it.

    Raises:
        RunError: saying what to do.
    """
    for folder in (run.path, run.slurm_dir, run.path / "code"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise RunError(
                f"{folder}: cannot be written to, and a job keeps its script, log and code there: have its owner give "
                "you the right (chmod g+w), or submit a copy of the run (config.yaml, checkpoints/) of your own."
            )


def place_of(run: Run, verb: str, words: Sequence[str]) -> Path:
    """The folder of a job's shards: next to its output, or of a benchmark, whose tables are in the log, in the run.

    Raises:
        ConfigError: for a job whose results would go nowhere, and words that are the job's own.
    """
    if any(word.partition("=")[0] == "--devices" for word in words):
        raise ConfigError("--devices: say how many processes a node has with --gpus-per-node, before the `--`.")
    if verb == "benchmark":
        mark = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
        return run.slurm_dir / f"benchmark-{mark}.shards"
    told = [
        after if word == "--out" else word.partition("=")[2]
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word == "--out" or word.startswith("--out=")
    ]
    out = told[-1] if told else ""  # the last one counts
    if not out:
        raise ConfigError(f"--job={verb}: its results need a file: add --out FILE, behind the `--`.")
    check_output(Path(out))
    return shards_of(Path(out).parent.resolve() / Path(out).name)  # one place by any path
