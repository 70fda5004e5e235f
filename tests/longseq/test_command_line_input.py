"""What people, shells, terminals and other launchers hand to the command line: real processes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import LONGSEQ, longseq
from longseq.cli import VERBS, main
from longseq.config.loading import config_of, described_keys, load_config, save_config
from longseq.errors import ConfigError

TINY = """
run: {dir: runs}
model: {preset: tiny}
attention: {features: 16}
data: {length: 32, batch_tokens: 128, valid_samples: 4, train: good.fasta}
optim: {warmup_steps: 1}
trainer: {accelerator: cpu, max_steps: 2, probe_every: 0, log_every: 1, valid_every: 0, checkpoint_every: 0, strategy: single}
"""  # noqa: E501
LATIN = os.fsdecode(b"prot\xe9ines")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a configuration, a FASTA file, and a run that has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    letters = itertools.cycle("ACDEFGHIKLMNPQRSTVWY")
    records = (f">p{i}\n{''.join(itertools.islice(letters, 20 + i))}\n" for i in range(40))
    (folder / "good.fasta").write_text("".join(records))
    (folder / "tiny.yaml").write_text(TINY)
    assert longseq("fit", "tiny.yaml", "run.name=r", folder=folder).code == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "tiny.yaml", f"data.train={LATIN}.fasta"),
        ("fit", f"{LATIN}.yaml"),
        ("evaluate", LATIN),
        ("score", "runs/r", "good.fasta", "--out", LATIN),
        ("data", "inspect", LATIN),
        ("resume", "runs/r", f"run.name={LATIN}"),
    ],
    ids=["override", "configuration", "run", "output", "file", "resume"],
)
def test_an_argument_that_is_not_utf8_is_refused_in_one_sentence(trained, words):
    ended = longseq(*words, folder=trained)
    assert ended.code == 1
    assert "it is not UTF-8, so no configuration can hold it; write it in UTF-8, or rename the file." in ended.sentence


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "tiny.yaml", "data.train=~nouser/x.fasta"),
        ("fit", "tiny.yaml", "run.dir=~nouser/x"),
        ("evaluate", "~nouser/r"),
        ("data", "inspect", "~nouser/x"),
        ("data", "verify", "~nouser/x"),
        ("evaluate", "runs/r", "--data", "~nouser/x"),
    ],
)
def test_the_home_of_nobody_is_refused_in_one_sentence(trained, words):
    ended = longseq(*words, folder=trained)
    assert ended.code == 1
    assert "does not exist" in ended.sentence


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("fit", "loop"), "Too many levels of symbolic links"),
        (("fit", "tiny.yaml", "run.dir=loop"), "Too many levels of symbolic links"),
        (("resume", "loop"), "no such run folder"),
        (("evaluate", "loop"), "no such run folder"),
    ],
)
def test_links_that_lead_back_to_themselves_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    Path("good.fasta").write_text(">a\nMKVLAACDEFGHIK\n" * 20)
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert why in said
    assert said.splitlines()[-1].startswith("longseq: error: ")


@pytest.mark.parametrize(
    "terminal",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
@pytest.mark.parametrize("words", [("data", "inspect", "good.fasta"), ("evaluate", "runs/r", "--details")])
def test_a_letter_that_a_terminal_lacks_is_replaced(trained, terminal, words):
    plain = longseq(*words, folder=trained)
    ended = longseq(*words, folder=trained, environment=terminal)
    assert (plain.code, ended.code) == (0, 0)
    assert not plain.out.isascii()
    assert ended.out == plain.out.encode("ascii", "replace").decode()


@pytest.mark.skipif(shutil.which("localedef") is None, reason="localedef makes the locale")
def test_a_latin1_terminal_gets_its_letters_and_replacements(trained):
    made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", "./loc"], cwd=trained, capture_output=True)
    if not (trained / "loc").is_dir():
        pytest.skip(f"this machine has no sources of locales: {made.stderr.decode(errors='replace')}")
    ended = subprocess.run(
        [LONGSEQ, "data", "inspect", "good.fasta"],
        cwd=trained, env={**os.environ, "LOCPATH": str(trained), "LC_ALL": "loc"}, capture_output=True,
    )  # fmt: skip
    plain = longseq("data", "inspect", "good.fasta", folder=trained)
    assert ended.stdout == plain.out.encode("latin-1", "replace")


def test_a_reader_that_has_enough_ends_the_command_without_a_word(trained):
    script = f"{LONGSEQ} data inspect good.fasta 2>err | head -1"
    subprocess.run(["bash", "-c", script], cwd=trained, check=True, capture_output=True)
    assert "Traceback" not in (trained / "err").read_text()
    assert "Exception" not in (trained / "err").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_an_output_that_is_full_is_said(trained):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [LONGSEQ, "data", "inspect", "good.fasta"], cwd=trained, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == (
        "longseq: error: input or output: No space left on device; make room, or choose another disk."
    )
    assert b"Traceback" not in done.stderr


def test_ranks_of_another_launcher_are_not_believed(trained):
    theirs = {
        **{f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("SIZE", "1"))},
        **{"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "1"},
        **{"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"},
    }
    words = ("trainer.devices=2", "trainer.strategy=deepspeed", "run.name=mpi")
    ended = longseq("fit", "tiny.yaml", *words, folder=trained, environment=theirs)
    assert ended.code == 0, ended.err
    assert "on 2 CPU process(es)" in ended.err


def test_the_output_of_a_run_on_this_machine_is_kept_and_shown(trained):
    ended = longseq("logs", "runs/r", folder=trained)
    assert ended.code == 0
    assert "step 2/2  loss " in ended.out
    assert longseq("logs", "-f", "runs/r", "-n", 1, folder=trained).out == ended.out.splitlines()[-1] + "\n"
    assert (
        "rank 1 has no log: those of ranks 0 are there"
        in longseq("logs", "runs/r", "--rank", 1, folder=trained).sentence
    )


def test_a_size_of_the_preset_is_said_and_accepted(trained):
    assert "model.dim=64: the run" in (sentence := longseq("resume", "runs/r", "model.dim=64", folder=trained).sentence)
    assert "was started with 128" in sentence
    assert "finished at step 2" in longseq("resume", "runs/r", "model.dim=128", folder=trained).sentence


def test_a_key_with_digits_is_no_path(trained):
    sentence = longseq("evaluate", "runs/r", "deepspeed.fp16.loss_scale=0", folder=trained).sentence
    assert "deepspeed.fp16 is set, but trainer.strategy=single" in sentence


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["fit", "C", "--devices", "2"], "trainer.devices=2"),
        (["fit", "C", "--lr=0.1", "--nodes", "3"], "optim.lr=0.1 trainer.nodes=3"),
        (["check", "C", "--steps", "9"], "trainer.max_steps=9"),
        (["resume", "R", "--batch-size", "9"], "data.batch_tokens=9"),
        (["submit", "C", "--output-dir", "x"], "run.dir=x"),
        (["data", "prepare", "C", "--split-by", "cluster", "--output-dir=x"], "split_by=cluster output=x"),
    ],
)
def test_an_option_that_is_a_key_is_shown_as_one(words, hint, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.endswith(f": keys are written without dashes, as {hint}\n")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainer.accelerator=gpu", "cuda"),
        ("trainer.precision=16-mixed", "fp16"),
        ("trainer.precision=bfloat16", "bf16"),
        ("trainer.strategy=fsdp", "deepspeed"),
        ("model.objective=mlm", "masked"),
        ("attention.kind=softmax", "exact"),
        ("model.hidden_size=3", "model.dim "),
        ("model.num_layers=3", "model.depth "),
        ("data.seq_len=3", "data.length "),
        ("trainer.epochs=3", "trainer.max_steps "),
        ("trainer.gpus=3", "trainer.devices "),
        ("optim.max_grad_norm=3", "optim.clip "),
        ("trainer.gradient_accumulation_steps=3", "trainer.accumulate "),
        ("data.num_workers=3", "data.workers "),
        ("run.output_dir=3", "run.dir "),
        ("trainer.save_every=3", "trainer.checkpoint_every "),
    ],
)
def test_the_words_of_other_libraries_are_understood(trained, override, hint, capsys):
    assert main(["fit", str(trained / "tiny.yaml"), override]) == 1
    assert f"Did you mean {hint}" in capsys.readouterr().err


def test_the_list_of_an_experiment_needs_no_data(capsys):
    file = Path(__file__).parents[2] / "configs/experiments/transfer.yaml"
    assert main(["experiment", str(file), "--list"]) == 0
    assert capsys.readouterr().out.count("run.name=") == 6


NUMBERS = [f"{s}.{k}" for s, k, about in described_keys() if about["type"].startswith(("int", "float", "list[f"))]
ODD = ["", "-1e400", "nan", ".nan", "inf", "-.inf", "1e400", str(10**40), "1:30", "012", "NO", "2024-01-01", "[", "{"]
ODD += ["{a: 1}", "[1, 2, [3]]", "[nan]", "[1e400]", "x", "'", "1 2", "&a", "*a", "!!int x", "@", "${x", "0x"]
ODD += ["${oc.env:NOT_SET}", "\x07", "!!python/object:os.system x", "? x", "- 1", "a: b", "|", ">", "%x"]


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_number_within_the_limits_is_refused_in_one_sentence(key):
    """Each key is given a fifth of the texts, the next key another one, and ``make test-long`` gives it all."""
    first = NUMBERS.index(key)
    refuse(key, [*ODD, "[" * 2000] if first == 0 else ODD[first % 5 :: 5])


@pytest.mark.long
@pytest.mark.parametrize("key", NUMBERS)
def test_every_text_that_is_no_number_is_refused_by_every_key(key):
    refuse(key, ODD)


def refuse(key, texts):
    for text in texts:
        if text == str(10**40) and not key.startswith(("run", "data")):
            continue  # a number, if a large one, to keys that take fractions
        with pytest.raises(ConfigError) as refused:
            config_of({}, "c.yaml", [f"{key}={text}"])
        assert "\n" not in str(refused.value)
        assert key in str(refused.value)


def test_a_variable_that_is_not_set_is_named_with_its_line(trained, monkeypatch):
    file = trained / "variables.yaml"
    file.write_text(TINY.replace("dir: runs", "dir: '${oc.env:WHERE_RUNS_GO}/runs'"))
    with pytest.raises(ConfigError, match=r"variables.yaml:2: run.dir: .*WHERE_RUNS_GO"):
        load_config(file)
    monkeypatch.setenv("WHERE_RUNS_GO", "/scratch")
    config = load_config(file)
    assert config.run.dir == "/scratch/runs"
    save_config(config, trained / "kept.yaml")
    monkeypatch.delenv("WHERE_RUNS_GO")
    assert load_config(trained / "kept.yaml") == config


WAITS = """
import sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            import os, time
            os.write(1, b"importing")
            for _ in range(6000):  # a signal between two calls is seen after the next
                time.sleep(0.01)
sys.meta_path.insert(0, Slow())
sys.argv = ["longseq", *{words!r}]
from longseq.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("verb", "module"),
    [("fit", "argparse"), *((verb, f"longseq.commands.{verb}{'_' * (verb == 'import')}") for verb in VERBS)],
)
def test_ctrl_c_while_a_verb_is_imported_ends_with_130_and_without_a_word(verb, module):
    program = WAITS.format(module=module, words=[verb, "x"])
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(9) == b"importing"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"")
