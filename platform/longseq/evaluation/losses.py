"""Processes that share a file and were lost: the system killed them, or they crashed. Each is started anew."""

from __future__ import annotations

import sys
from pathlib import Path

from longseq.errors import LongseqError, PassingError
from longseq.launch.workers import Workers
from longseq.runs import starts

SHARD = ".shard"  # what the name of a finished part ends in
_MOST_LOSSES = 3  # of one process

Losses = dict[int, tuple[int, int]]  # of a process: how often since its last shard, and its shards then


def replace_lost(workers: Workers, losses: Losses) -> None:
    """Start anew whichever was lost.

    Raises:
        LongseqError: for one that was lost for the third time without a shard in between; in a job, where the next
            start may do better, PassingError. And, as DataError too, what one has said itself.
    """
    for rank, how in workers.lost().items():
        finished = sum(_number(path) % workers.world == rank for path in workers.place.glob(f"*{SHARD}"))
        times, before = losses.get(rank, (0, finished))
        losses[rank] = (times + 1 if finished == before else 1, finished)
        if losses[rank][0] == _MOST_LOSSES:
            raise (PassingError if starts.own() else LongseqError)(
                f"process {rank} of {workers.world} {how}, for the third time; is there enough memory for that many? "
                "Take fewer devices."
            )
        print(f"longseq: warning: process {rank} of {workers.world} {how}: its shard is done again", file=sys.stderr)
        workers.start_again(rank)


def _number(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])
