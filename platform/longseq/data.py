"""From the ``data`` section of a configuration to samples: of files, or of a prepared corpus. No torch here."""

from __future__ import annotations

from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longseq.clusters import members_of_split, resolve_clusters
from longseq.config.checks import check_pixels
from longseq.config.schema import Config
from longseq.config.sections import DataConfig
from longseq.config.sources import parsed
from longseq.errors import USER_ERRORS, ConfigError
from longseq_data.corpus.corpus import is_corpus
from longseq_data.corpus.manifest import Manifest, read_manifest
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.ingest.cache import default_folder
from longseq_data.ingest.ring import Ring
from longseq_data.prepare.identity import identity_of
from longseq_data.randomness import words
from longseq_data.readers.reading import TABLES, TOKENS, Reading, agree
from longseq_data.readers.sources import expand_sources
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.draw import Draw
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.rank_share import Samples
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import InfillVocabulary, Vocabulary

SPLITS = ("train", "valid", "test", "ood")


def resolve_sources(config: Config) -> None:
    """Replace every path, glob and URL of the ``data`` section by absolute paths and URLs that exist.

    Raises:
        DataError: for one that does not, for files that do not go together, and for a corpus that is not whole.
        ConfigError: for keys that do not fit the files.
    """
    data = config.data
    for split in SPLITS:
        sources = data.sources(split)
        for source in sources:
            source["path"] = _resolved(split, source["path"], data.format)
        if not sources:
            setattr(data, split, _resolved(split, getattr(data, split), data.format))
    if data.tokenizer not in ("auto", *TOKENS):
        data.tokenizer = str(user_path(data.tokenizer).absolute())
    if data.cache not in ("auto", "none"):
        data.cache = str(user_path(data.cache).absolute())
    if config.model.init_from:
        config.model.init_from = str(user_path(config.model.init_from).absolute())
    for entry in config.trainer.benchmarks:
        for name in {"path", "wild_type"} & entry.keys():
            entry[name] = str(user_path(entry[name]).absolute())
    if config.finetune.table:
        try:
            table, *others = expand_sources([config.finetune.table])
        except DataError as error:
            raise ConfigError(f"finetune.table: {error}") from None
        if others:
            raise ConfigError(f"finetune.table={config.finetune.table}: {1 + len(others)} files; name one.")
        config.finetune.table = table
    corpora = [path for path in data.files("train") if is_corpus(path)]
    if data.by_length and data.sources("train"):
        raise ConfigError(
            f"data.packing={data.packing} sorts the sequences of one corpus by their lengths, and several sources are "
            "mixed sample by sample: take data.packing=crop."
        )
    if data.by_length and not corpora:
        raise ConfigError(
            f"data.packing={data.packing} sorts sequences by their lengths, which only a prepared corpus knows "
            "beforehand: make one with `longseq data prepare`, or take data.packing=crop."
        )
    resolve_clusters(data, corpora)
    for corpus in corpora:
        _check_corpus(config, corpus, read_manifest(Path(corpus)))
    tokens = vocabulary(config)
    if tokens.name == "pixels":
        check_pixels(config)
    if data.reverse_complement and tokens.name != "dna":
        raise ConfigError(
            f"data.reverse_complement=true turns the strands of DNA, and data.train is read as {tokens.name}: set "
            "data.tokenizer=dna, or leave it out."
        )
    if data.reverse and tokens.name != "protein":
        raise ConfigError(
            f"data.reverse={data.reverse} is about proteins, and data.train is read as {tokens.name}: leave it out."
        )
    if config.model.mask_scaling and tokens.mask != tokens.size - 1:
        raise ConfigError(
            f"model.mask_scaling=true knows MASK as the last token, but of {tokens.name} it is {tokens.mask} of "
            f"{tokens.size}: set model.mask_scaling=false."
        )
    files = _files(config)
    if data.column is not None and not any(leaf.format in TABLES for leaf in reading(config).leaves(files)):
        raise ConfigError(
            f"data.column={data.column}: none of the files is a table ({', '.join(TABLES)}); leave it out."
        )


def reading(config: Config) -> Reading:
    """How the files become documents, once their names are resolved.

    Raises:
        DataError: for files that do not go together.
    """
    data = config.data
    return Reading(
        format=data.format,
        tokens=agree(_files(config), data.format, data.tokenizer),
        column=data.column,
        image_size=data.image_size,
        part_bytes=data.part_bytes,
    )


def vocabulary(config: Config) -> Vocabulary:
    """The tokens that the model reads and predicts.

    Raises:
        DataError: for a tokenizer's file that cannot be read, and for data of different tokens.
    """
    known = {path: read_manifest(Path(path)).vocabulary for path in _corpora(config)}
    files = _files(config)
    if files or not known:
        known[files[0] if files else "data"] = reading(config).vocabulary
    (first, tokens), *others = known.items()
    for source, other in others:
        if other != tokens:
            raise DataError(
                f"One model cannot read {first} ({tokens.name}) and {source} ({other.name}): their tokens differ; "
                "remove one of them."
            )
    return InfillVocabulary.of(tokens) if config.model.objective == "fim" else tokens


class Where(NamedTuple):
    """What one source of a split is read from."""

    paths: list[str]
    own: bool  # named for this split, and not held out of data.train
    name: str | None = None  # of a source among several
    weight: float = 1.0

    @property
    def corpus(self) -> str | None:
        """The prepared corpus; None: it is files."""
        return self.paths[0] if is_corpus(self.paths[0]) else None


def sources_of(config: Config, split: str) -> list[Where]:
    """Where a split comes from: what is named for it, or held out of the training data; empty: there is none."""
    data = config.data
    if config.finetune.table:
        return []
    own = split == "train" or bool(getattr(data, split))
    share = {"valid": data.valid_fraction, "test": data.test_fraction}.get(split, 0.0)
    of = split if own else "train"
    sources = [Where(each["path"], own, each["name"], each["weight"]) for each in data.sources(of)]
    found = sources or [Where(data.files(of), own)]
    if own:
        return found
    return [
        where for where in found if (split in read_manifest(Path(where.corpus)).splits if where.corpus else share > 0)
    ]


def corpus_of(config: Config, split: str) -> str | None:
    """The first prepared corpus that a split comes from; None where it comes from files, or there is no such split."""
    return next((where.corpus for where in sources_of(config, split) if where.corpus), None)


def begins(config: Config, tokens: Vocabulary) -> int:
    """The token before a record: the end of another where records were joined, else BOS.

    The one that evaluations begin with too; longseq_data.samples.streaming.evaluation_windows says why.
    """
    return tokens.eos if config.data.packing == "concat" and not config.data.reset else tokens.bos


def split_spec(config: Config, split: str) -> Samples:
    """The samples of one split: of the corpora or the files named for it, of the training corpora, or a share of the
    training files held out by the record.

    Raises:
        ConfigError: if the configuration names no such data.
    """
    data, found = config.data, sources_of(config, split)
    if not found:
        corpus = next(filter(is_corpus, data.files("train")), None)
        if corpus:
            there = ", ".join(read_manifest(Path(corpus)).splits)
            raise ConfigError(
                f"there is no {split} split: {corpus} has {there}. Prepare a corpus with one, or set data.{split}."
            )
        keys = f"data.{split}" if split == "ood" else f"data.{split} or data.{split}_fraction"
        raise ConfigError(f"there is no {split} split: set {keys}.")
    if found[0].name is None:
        return _spec(config, split, found[0], config.run.seed)
    before = [parsed(note) for note in data.reweighted] if split == "train" else []
    if any(len(weights) != len(found) for _, weights in before) or before != sorted(before, key=itemgetter(0)):
        raise ConfigError(
            f"data.reweighted: {data.reweighted} are not weights of {len(found)} sources in the order of samples; "
            "leave it out."
        )
    seeds = [config.run.seed] * len(found)
    if split == "train":  # or parts of one size would come in one order
        seeds = [int(words(config.run.seed, "source", number)[0] >> np.uint64(1)) for number in range(len(found))]
    return MixtureSpec(
        tuple(str(where.name) for where in found),
        tuple(_spec(config, split, where, seed) for where, seed in zip(found, seeds, strict=True)),
        Draw(config.run.seed, [where.weight for where in found], before),
        config.run.seed,
        data.reset,
    )


def _spec(config: Config, split: str, where: Where, seed: int) -> Samples:
    """The samples of one source."""
    data = config.data
    objective = "causal" if config.causal else "masked"
    if where.corpus:
        return CorpusSpec(
            path=where.corpus,
            split=split,
            length=data.length,
            packing=data.packing,
            objective=objective,
            seed=seed,
            reset=data.reset,
            crop=data.crop,
            batch_tokens=data.batch_tokens,
            members=members_of_split(config, split, where.corpus, cache_folder(data.cache)),
            reverse_complement=data.reverse_complement,
            reverse=data.reverse,
            fim_rate=config.fim_rate,
        )
    return StreamSpec(
        sources=tuple(where.paths),
        split=None if where.own and split != "train" else split,
        # A share is held out only where no files were named for that split.
        valid_fraction=0.0 if data.valid else data.valid_fraction,
        test_fraction=0.0 if data.test else data.test_fraction,
        split_by=data.split_by,
        reverse_complement=data.reverse_complement,
        reverse=data.reverse,
        fim_rate=config.fim_rate,
        length=data.length,
        packing="crop" if data.by_length else data.packing,  # files named next to a corpus are scored, not trained on
        objective=objective,
        seed=seed,
        shuffle_buffer=data.shuffle_buffer,
        strict=data.strict,
        reading=reading(config),
        reset=data.reset,
        crop=data.crop,
        later_epochs="permutation" if data.later_epochs == "permutation" else "buffer",
        cache=cache_folder(data.cache),
        ring=_ring(config) if split == "train" else None,
    )


def _ring(config: Config) -> Ring | None:
    """What a run's processes share without a cache; None: there is one, or no run."""
    run = config.run
    return Ring(str(user_path(run.dir).absolute() / run.name)) if config.data.cache == "none" and run.name else None


def begin_reading(config: Config) -> None:
    """Have the files of a training read, once for all its processes, while everything else is started.

    What is wrong with them is said where they are looked at.

    Raises:
        ConfigError: for an order that needs the blocks, which are not kept.
    """
    data = config.data
    if data.later_epochs == "permutation" and data.cache == "none" and not all(map(is_corpus, data.files("train"))):
        raise ConfigError(
            "data.later_epochs=permutation needs the blocks of data.cache, and data.cache=none keeps none: leave "
            "data.cache out or name a folder; a new run may set data.later_epochs=buffer."
        )
    for split in () if config.finetune.table else read_while_training(config):
        with suppress(*USER_ERRORS):  # said where they are looked at
            split_spec(config, split).begin()


def read_while_training(config: Config) -> list[str]:
    """The splits that a training reads."""
    return ["train", *(["valid"] if config.trainer.valid_every else [])]


def fix_order(config: Config) -> None:
    """For a new run: write down the order of later epochs, which must not change with the version. The sources are
    resolved."""
    data = config.data
    if data.later_epochs != "auto" or all(map(is_corpus, data.files("train"))):
        return
    samples = split_spec(config, "train")
    parts = samples.parts if isinstance(samples, MixtureSpec) else (samples,)
    kept = data.shuffle_buffer > 1 and all(part.keeps_all for part in parts if isinstance(part, StreamSpec))
    data.later_epochs = "permutation" if kept else "buffer"


def cache_folder(name: str) -> str | None:
    """Where blocks are kept, by data.cache; None: nowhere."""
    if name == "none":
        return None
    return str(default_folder() if name == "auto" else user_path(name).absolute())


def identities(config: Config) -> dict[str, list[str | None]]:
    """What tells the data of each split, and the table of clusters, apart from others, in the order of its sources;
    without ood, which no training looks at."""
    if config.finetune.table:
        return {"table": [identity_of(config.finetune.table)]}
    keys = (*(split for split in SPLITS if split != "ood"), *(["clusters"] if config.data.clusters else []))
    return {key: [identity_of(name) for name in config.data.files(key)] for key in keys}


def _resolved(split: str, patterns: list[str], format: str) -> list[str]:
    corpora = [name for name in patterns if isinstance(name, str) and is_corpus(name)]
    if not corpora:
        return expand_sources(patterns, format)
    if len(patterns) > 1:
        raise ConfigError(
            f"data.{split} names {corpora[0]}, a prepared corpus, and {len(patterns) - 1} more: "
            "a corpus is not listed with others. Give each a weight of its own ([{path: ..., weight: ...}, ...]), or "
            "name one of them."
        )
    path = user_path(corpora[0]).absolute()
    read_manifest(path)  # one that is not whole is refused
    return [str(path)]


# Keys that say how files are read: of a corpus that was said when it was prepared.
_OF_FILES = ("format", "column", "part_bytes", "image_size", "strict")


def _check_corpus(config: Config, corpus: str, manifest: Manifest) -> None:
    """Refuse keys that a prepared corpus has decided otherwise."""
    data, plain = config.data, DataConfig()
    if not _files(config):
        for name in _OF_FILES:
            if getattr(data, name) not in (getattr(plain, name), manifest.settings.get(name)):
                raise ConfigError(
                    f"data.{name}={getattr(data, name)} says how files are read, and {corpus} has been prepared: leave "
                    "it out, or prepare another corpus."
                )
        if data.tokenizer not in ("auto", manifest.vocabulary.name):
            raise ConfigError(
                f"data.tokenizer={data.tokenizer}, but {corpus} was prepared as {manifest.vocabulary.name}: leave it "
                "out, or prepare another corpus."
            )
    if manifest.vocabulary.name == "pixels":
        data.image_size = int(str(manifest.settings["image_size"]))
    mixed = not all(map(is_corpus, data.files("train")))  # with files, of which the fractions are
    for name in () if mixed else ("valid_fraction", "test_fraction"):
        prepared = manifest.settings.get(name)
        if getattr(data, name) not in (getattr(plain, name), prepared):
            raise ConfigError(
                f"data.{name}={getattr(data, name)}, but {corpus} was prepared with {name}={prepared}, and its splits "
                f"are fixed: leave data.{name} out, or prepare another corpus."
            )
    if config.trainer.valid_every and not sources_of(config, "valid"):
        raise ConfigError(
            f"trainer.valid_every={config.trainer.valid_every}, but {corpus} has no valid split: name files or a "
            "corpus in data.valid, prepare it with valid_fraction above 0, or set trainer.valid_every=0."
        )


def _corpora(config: Config) -> list[str]:
    return [source for split in SPLITS for source in config.data.files(split) if is_corpus(source)]


def _files(config: Config) -> list[str]:
    return [source for split in SPLITS for source in config.data.files(split) if not is_corpus(source)]
