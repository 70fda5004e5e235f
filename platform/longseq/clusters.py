"""Which records of a prepared corpus belong together: ``data.clusters``. No torch here."""

from __future__ import annotations

from pathlib import Path

from longseq.config.schema import Config
from longseq.config.sections import DataConfig
from longseq.errors import ConfigError
from longseq_data.files import user_path
from longseq_data.os_errors import explained
from longseq_data.prepare.members import member_index


def resolve_clusters(data: DataConfig, corpora: list[str]) -> None:
    """Make the table's name absolute.

    Raises:
        ConfigError: where a packing needs a table, or has no use for one.
    """
    if data.packing == "family" and data.clusters is None:
        raise ConfigError(
            "data.packing=family joins the members of a cluster, and nothing says which records are one: set "
            "data.clusters to a table of representative and member, as `mmseqs easy-cluster` writes it."
        )
    if data.clusters is None:
        return
    clusters = f"data.clusters={data.clusters}"
    if len(corpora) < len(data.files("train")):
        raise ConfigError(
            f"{clusters} draws members from prepared corpora, which know all records beforehand, and data.train has "
            "files: prepare them with `longseq data prepare`, or leave it out."
        )
    if data.packing == "concat":
        raise ConfigError(
            f"{clusters} draws whole records, and data.packing=concat cuts them: take crop, bucket or family."
        )
    if data.cache == "none":
        raise ConfigError(
            f"{clusters} keeps which records belong together in data.cache, and data.cache=none: leave it out."
        )
    if not user_path(data.clusters).is_file():
        raise ConfigError(f"{clusters}: no such file; correct the name.")
    data.clusters = str(user_path(data.clusters).absolute())


def members_of_split(config: Config, split: str, corpus: str, folder: str | None) -> str | None:
    """The members that a split takes one of, or all of each; None: it takes records as they are."""
    data = config.data
    whole = data.packing == "family"
    return members_of(config, corpus, split, folder) if data.clusters and (whole or split == "train") else None


def members_of(config: Config, corpus: str, split: str, folder: str | None) -> str:
    """Which records belong together, a file in the cache's ``folder``: made by the first that asks."""
    try:
        return member_index(corpus, split, str(config.data.clusters), Path(str(folder)))
    except OSError as error:
        raise ConfigError(f"data.clusters: {explained(error)}.") from None
