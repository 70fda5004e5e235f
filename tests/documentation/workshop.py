"""The files and runs that the pages speak of, in small, and the hands that type what the pages show."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from documentation.pages import ROOT
from longseq.cli import main
from longseq.runs.curves import read_curves
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

ESM_TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")

# Behind what a page says, so that a training takes two steps of a tiny model.
MODEL = ("model.dim=32", "model.depth=1", "model.heads=2", "model.ffn_dim=48", "attention.features=16")
TRAINING = (
    *("trainer.accelerator=cpu", "trainer.precision=fp32", "trainer.accumulate=1", "trainer.max_steps=2"),
    *("trainer.log_every=1", "trainer.valid_every=2", "trainer.checkpoint_every=1", "trainer.probe_every=2"),
    *("trainer.keep_checkpoints=3", "optim.warmup_steps=1"),
    *("data.valid_samples=2", "data.workers=0", "trainer.activation_checkpointing=false"),
)
LENGTH = 64
# What a verb takes instead of what the page says, or in addition.
OPTIONS = {"--records": "200", "--number": "2", "--length": "8", "--devices": "1", "--mean-length": "60"}
EXTRA = {
    ("data", "prepare"): ("workers=1", "memory_mb=64", "valid_fraction=0.1", "test_fraction=0.1"),
    ("evaluate",): ("--bootstrap", "20"),
    ("finetune",): ("--bootstrap", "20", "trainer.max_steps=2", "trainer.valid_every=1", "trainer.accelerator=cpu"),
}


def furnish(folder: Path) -> Path:
    """A folder as the pages suppose it: configurations, a cluster's profiles, proteins, a book, pictures, a corpus."""
    for name in ("configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    proteins = ("a.fasta.gz", "b.fasta.gz", "proteins.fasta", "proteins.fasta.gz", "viruses.fasta.gz")
    splits = [f"data/proteomes/{split}/one.fasta.gz" for split in ("train", "valid", "test")]
    for seed, name in enumerate([*proteins, "data/uniref50.fasta.gz", "data/synthetic.fasta.gz", *splits]):
        write_fasta(SyntheticSpec(families=4, records=160, seed=seed, mean_length=60), folder / name)
    source, corpus = str(folder / "data/uniref50.fasta.gz"), str(folder / "data/uniref50")
    prepare(PrepareConfig(sources=[source], output=corpus, workers=1, valid_fraction=0.1, test_fraction=0.1))
    wild = "MKVLAAGIVGLCARLAKKYGEDAAGTYWHCLPQRSV"
    assert wild[23] == "A"
    assert wild[29] == "C"
    (folder / "wildtype.fasta").write_text(f">wild\n{wild}\n")
    (folder / "list.txt").write_text("M1A\nK2R\n")
    (folder / "holes.fasta").write_text(">one\nMKV??AGI\n")
    (folder / "book.txt").write_text("".join(f"It was line {i}, and {i * i} came after it.\n" for i in range(300)))
    rng = random.Random(0)
    bases = [f">c{i}\n{''.join(rng.choices('ACGT', k=300))}\n" for i in range(60)]
    (folder / "genome.fasta").write_text("".join(bases))
    subprocess.run(["gzip", folder / "genome.fasta"], check=True)
    colours = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(40):
        Image.fromarray(colours.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    esm2(folder / "esm2_t6_8M_UR50D")
    judges(folder, wild)
    labels = [f"{''.join(rng.choices('ACDEFGHIKLMNPQRSTVWY', k=30))},{rng.random():.3f}" for _ in range(90)]
    (folder / "labelled.csv").write_text("\n".join(["sequence,stability", *labels, ""]))
    return folder


def judges(folder: Path, wild: str) -> None:
    """What `longseq benchmark` reads: an assay with its reference file, and chains."""
    (folder / "gym").mkdir()
    reference = f"DMS_id,DMS_filename,target_seq,coarse_selection_type\nGB1_2014,GB1_2014.csv,{wild},Binding\n"
    (folder / "gym" / "DMS_substitutions.csv").write_text(reference)
    rows = "".join(f"{wild[at]}{at + 1}W,{at % 7},{at % 2}\n" for at in range(20))
    (folder / "gym" / "GB1_2014.csv").write_text(f"mutant,DMS_score,DMS_score_bin\n{rows}")
    chain = {"sequence": wild, "contacts": [[0, 9], [3, 20]], "secondary_structure": (12 * "HE-")[: len(wild)]}
    (folder / "chains.jsonl").write_text("".join(json.dumps({"id": f"c{i}", **chain}) + "\n" for i in range(22)))


def esm2(folder: Path) -> None:
    """A folder as Hugging Face has it of ESM-2: one block of random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    settings = transformers.EsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        position_embedding_type="rotary",
        token_dropout=True,
        max_position_embeddings=1026,
        **sizes,
    )
    transformers.EsmForMaskedLM(settings).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS))


class Hands:
    """Types commands in one folder after the other. A training that was typed before is copied from there."""

    def __init__(self, template: Path):
        self.template = template
        self.trained: dict[frozenset[tuple[str, str]], Path] = {}
        self.several = False  # whether whole sequences have been trained on by several processes: once is enough

    def type(self, block: str, setenv: Callable[[str, str], None]) -> None:
        """All commands of a block, in the current folder; setenv takes what they export.

        Raises:
            AssertionError: where one of them does not end with 0, or is one that nobody here knows.
        """
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                if words:
                    self._run(words, setenv)

    def _run(self, words: list[str], setenv: Callable[[str, str], None]) -> None:
        verb, *rest = words
        if verb == "longseq":
            self._longseq(rest)
        elif verb == "export":
            name, _, value = rest[0].partition("=")
            setenv(name, value.replace("$PWD", str(Path.cwd())))
        elif verb == "cp":
            subprocess.run(words, check=True)
        elif verb == "tensorboard":  # it would serve for ever: what it would show
            folder = Path(rest[rest.index("--logdir") + 1])
            assert any("train/loss" in read_curves(found) for found in folder.rglob("tensorboard"))
        else:
            pytest.fail(f"{verb}: no test knows this command; say before the block why it is not run")

    def _longseq(self, words: list[str]) -> None:
        out = None
        if ">" in words:
            *words, _, out = words
        words = [OPTIONS.get(words[i - 1], word) for i, word in enumerate(words)]
        for start, extra in EXTRA.items():
            words += extra if tuple(words[: len(start)]) == start else ()
        if words[0] == "fit":
            self._fit([*words, *self._smaller(words)])
            return
        if words[0] == "check" and "--static" not in words:
            words += self._smaller(words)
        if words[0] == "resume":
            words.append("trainer.max_steps=3")
        if words[:2] == ["data", "prepare"]:  # the other pages have found it made
            shutil.rmtree("data/uniref50")
        if words[:2] == ["data", "synth"]:
            Path(words[2]).unlink(missing_ok=True)
        for word in words:
            self._bring(word)
        with (Path(out) if out else Path(".said")).open("w") as file, redirect_stdout(file):
            code = main(words)
        assert code == 0, f"longseq {shlex.join(words)}: exit code {code}"
        assert out is None or Path(out).stat().st_size > 0

    def _fit(self, words: list[str]) -> None:
        if not any(word.startswith("run.name=") for word in words):
            words = [*words, "run.name=unnamed"]
        (name,) = [word for word in words if word.startswith("run.name=")]
        keys = dict(word.split("=", 1) for word in words[2:])  # the last one of a key holds
        del keys["run.name"]
        what = frozenset([("", words[1]), *keys.items()])
        run = Path("runs") / name.partition("=")[2]
        if what in self.trained:
            shutil.copytree(self.trained[what], run, symlinks=True)
            return
        code = main(words)
        self.several |= keys["trainer.devices"] == "2" and keys["trainer.context_parallel"] == "1"
        assert code == 0, f"longseq {shlex.join(words)}: exit code {code}"
        assert (run / "FINISHED").exists()
        self.trained[what] = run.resolve()

    def _bring(self, word: str) -> None:
        """The run that a page speaks of, where no block before has trained it."""
        path = Path(word)
        if path.parts[:1] != ("runs",) or len(path.parts) != 2 or path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        if path.name == "masked":
            assert main(["import", "esm2_t6_8M_UR50D", str(path)]) == 0
        else:
            base = ["fit", "configs/protein/base.yaml", "data.train=[a.fasta.gz,b.fasta.gz]"]
            self._fit([*base, f"run.name={path.name}", *self._smaller(base)])

    def _smaller(self, words: list[str]) -> list[str]:
        """Overrides behind those of a page that make its training a small one of the same kind."""
        given = dict(word.split("=", 1) for word in words if "=" in word)
        length = int(given["data.length"]) if "data.image_size" in given else LENGTH
        sliced = int(given.get("trainer.context_parallel", 8 if "proteome" in words[1] else 1)) > 1
        processes = 2 if sliced or (given.get("trainer.devices") == "2" and not self.several) else 1
        places = (f"trainer.devices={processes}", f"trainer.context_parallel={2 if sliced else 1}")
        return [
            *(() if "model.init_from" in given else MODEL),
            *(("model.sequence_tile=32",) if "proteome" in words[1] else ()),
            *(("data.part_bytes=400",) if "/text/" in words[1] else ()),
            *TRAINING,
            *(places if processes > 1 else (*places, "trainer.strategy=single")),
            *(f"data.length={length}", f"data.batch_tokens={4 * length}"),
        ]
