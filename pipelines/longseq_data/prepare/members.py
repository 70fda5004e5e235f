"""Which records of a corpus belong to one cluster, so that an epoch can take one of each."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.files import aside

from .cluster_table import ClusterTable, read_clusters
from .identity import identify, identity_of

FORMAT = 1


def member_index(corpus: str, split: str, table: str, folder: Path) -> str:
    """A file that samples.members reads, made where it is not there yet; named by what it is made of.

    table: of (representative, member), as cluster_table reads it; a record that is not listed is a cluster of its own.

    Raises DataError for a table or a corpus that cannot be read, OSError where the folder cannot be written.
    """
    opened = Corpus.open(corpus, split)
    what = json.dumps([FORMAT, opened.fingerprint, split, identity_of(table), identify(table).stamp])
    path = folder / "members" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            listed = ClusterTable(Path(place) / "table.npy")
            read_clusters(table, listed.path)
            clusters = np.concatenate([listed.of(some) for some in opened.identifiers()])
        order = np.argsort(clusters, kind="stable").astype(np.int64)
        begins = np.flatnonzero(np.append(True, np.diff(clusters[order]) != 0))
        with aside(path) as partial, partial.open("wb") as handle:
            np.save(handle, np.concatenate([[len(begins)], begins, [len(order)], order]).astype(np.int64))
    return str(path)
