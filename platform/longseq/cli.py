"""``longseq``: one command, one verb per file in ``commands``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # all else, typing too, is imported where a Ctrl-C is heard
    import argparse
    from collections.abc import Callable, Collection, Sequence

# verb: what it does. The module of the same name in longseq.commands has add_arguments(parser) and run(args).
VERBS = {
    "configs": "the configurations that come with longseq: list them, copy them",
    "check": "before an expensive job: configuration, files, memory, devices, collectives, one step",
    "fit": "train a model here, with 1 process or more (trainer.devices=N)",
    "submit": "train on a SLURM cluster: multi-node jobs that come back by themselves",
    "jobs": "the runs that were submitted: job, state, step, loss, speed, starts, time left",
    "status": "one run in detail: its job, its starts, and where they got to",
    "watch": "a page that follows a run: loss, speed, time left, ranks, memory, checkpoints, last messages",
    "logs": "what a run's job has written; -f follows it",
    "cancel": "cancel the jobs of a run",
    "resume": "go on with a run from its newest whole checkpoint",
    "evaluate": "how well checkpoints predict: loss, accuracy, calibration, next to the empirical baseline",
    "sample": "new sequences from a causal model; masked positions filled in by a masked one",
    "score": "log-likelihoods of sequences, and effects of mutations",
    "embed": "a model's vectors of sequences, as Parquet or npz",
    "finetune": "teach a model the labels of a table: classes, numbers, a label for each residue",
    "predict": "labels of sequences, by a model that has learned them",
    "compare": "runs next to each other: settings that differ, losses, speed, scores",
    "benchmark": "what a protein model is worth: ProteinGym, contacts, secondary structure",
    "figures": "pictures of a run: curves, accuracy by length, attention, similarities, errors",
    "export": "a model as a Hugging Face folder: safetensors, config.json, tokenizer, model card",
    "import": "the weights of a Hugging Face Transformer (ESM-2, BERT-like), to go on with as a Performer",
    "data": "make and look at data",
    "experiment": "a table of runs next to the paper's numbers: configs/experiments/*.yaml",
    "ladder": "small models of a configuration's family that predict its loss, and its learning rate",
    "completion": "let a shell complete verbs, options, keys and files",
    "bench": "measure this machine, side by side with the exact Transformer and other libraries",
}


_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its result is the exit code. Without ``argv`` this is the whole process."""
    return _process(sys.argv[1:]) if argv is None else _run(argv, lambda: None)


def _process(argv: Sequence[str]) -> int:
    """One verb, and what belongs to a process: its output, and Ctrl-C from the first import to the last flush."""
    try:
        import gc
        import os
        import signal

        from longseq.interruption import Interruption

        interruption = Interruption()
        gc.disable()  # what modules make stays: none of it is garbage, now or later

        def begin() -> None:
            gc.freeze()
            gc.enable()
            interruption.work_begins()

        if "LONGSEQ_START" in os.environ:  # a job's
            from longseq.runs.fence import stand

            if _reported(stand):
                return 1
        for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to fail
            if stream is not None:
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            return _flushed(_run(argv, begin))
        except SystemExit as leaving:  # argparse, after its help or usage
            raise SystemExit(_flushed(leaving.code)) from None
        except Exception:
            if interruption.happened:  # what an import, say, has made of it
                return _INTERRUPTED
            if "LONGSEQ_NODES" in os.environ:  # in a job that tries again what crashes
                import traceback

                from longseq.errors import EXIT_CRASHED

                traceback.print_exc()
                return EXIT_CRASHED
            raise
        finally:
            # While the interpreter is taken apart there is nothing left to interrupt.
            if interruption.ours:
                signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _flushed(code: int | str | None) -> int:
    """The exit code, once all output is out: the interpreter's own flush would fail with a traceback."""
    return _reported(lambda: sys.stdout.flush() if sys.stdout else None) or int(code or 0)


def _run(argv: Sequence[str], begin: Callable[[], None]) -> int:
    code = _reported(lambda: _refuse_bytes(argv))
    if code:
        return code
    args = parsed(argv)
    begin()
    return _reported(lambda: args.run(args))


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb; the process ends where there is no such."""
    # Only the verb that is asked for is imported: `longseq --help` needs none of them.
    parser = parser_with(argv[:1])
    # What a job's own verb is to be told has options of its own, and argparse would look among them for `submit`'s.
    end = list(argv).index("--") if list(argv[:1]) == ["submit"] and "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:end])
    _place(args, rest, parser)
    if argv[end:]:
        args.overrides = [*args.overrides, *argv[end + 1 :]]
    return args


def parser_with(imported: Collection[str]) -> argparse.ArgumentParser:
    """The parser of the command line; of the verbs, those that are to be ``imported`` with their arguments."""
    import argparse
    import importlib
    import keyword

    from longseq import __version__

    parser = argparse.ArgumentParser(
        prog="longseq", description="Pretrain Performers (FAVOR+ linear attention) on very long sequences."
    )
    parser.add_argument("--version", action="version", version=f"longseq {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, about in VERBS.items():
        name = f"longseq.commands.{verb}{'_' * keyword.iskeyword(verb)}"
        module = importlib.import_module(name) if verb in imported else None
        formatter = argparse.RawDescriptionHelpFormatter
        child = verbs.add_parser(
            verb, help=about, description=module.__doc__ if module else None, formatter_class=formatter
        )
        if module:
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def _place(args: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    """Put the arguments of a list behind those before an option; argparse takes them in one block only."""
    words = [word for word in rest if not word.startswith("-") and "=" not in word and hasattr(args, "words")]
    others = [word for word in rest if word not in words]
    misplaced = [word for word in others if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if misplaced:
        hint = ""
        if hasattr(args, "overrides") or hasattr(args, "config"):
            from longseq.config.hints import keys_of_options
            from longseq.config.merging import meanings

            hint = keys_of_options(rest, getattr(args, "flat_keys", None) or meanings())
        parser.error(f"unrecognized arguments: {' '.join(misplaced)}{hint}")
    if words:
        args.words = [*args.words, *words]
    if others:
        args.overrides = [*args.overrides, *others]


def _refuse_bytes(argv: Sequence[str]) -> None:
    """Refuse arguments that no configuration, log or JSON could hold.

    Raises:
        LongseqError: naming the argument.
    """
    import os

    from longseq.errors import LongseqError

    for word in argv:
        if any("\udc80" <= letter <= "\udcff" for letter in word):  # Python's stand-ins for bytes
            why = "this terminal's locale has no such letters; set LC_ALL=C.UTF-8"
            if "\ufffd" in os.fsencode(word).decode(errors="replace"):
                why = "it is not UTF-8, so no configuration can hold it; write it in UTF-8, or rename the file"
            raise LongseqError(f"argument {word!a}: {why}.")


def _reported(work: Callable[[], int | None]) -> int:
    """The exit code of ``work``: what people can fix is one line on stderr."""

    from longseq.errors import EXIT_ERROR, USER_ERRORS

    try:
        return work() or 0
    except USER_ERRORS as error:
        print(f"longseq: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_ERROR)
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        _forget(sys.stdout)
        return EXIT_ERROR
    except OSError as error:  # a full or read-only disk, mostly
        import os

        from longseq.errors import EXIT_CRASHED
        from longseq_data.os_errors import explained, may_pass

        print(f"longseq: error: {explained(error)}.", file=sys.stderr)
        _forget(sys.stdout)
        return EXIT_CRASHED if "LONGSEQ_START" in os.environ and may_pass(error) else EXIT_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED


def _forget(stream: object) -> None:
    """Let what a stream still holds go nowhere, so that the interpreter's last flush does not fail."""
    import os
    from contextlib import suppress

    with suppress(OSError, ValueError, AttributeError):
        stream.flush()  # type: ignore[attr-defined]
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
