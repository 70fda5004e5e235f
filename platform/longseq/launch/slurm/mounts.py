"""Whether a container would see the files that a run or a job needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from longseq.config.schema import Config
from longseq.data import SPLITS
from longseq.errors import ConfigError
from longseq.launch.slurm.site import Site


def check_mounts(site: Site, config: Config, run: Path) -> None:
    """Refuse a run whose files lie outside of what is mounted.

    Raises:
        ConfigError: naming the first one.
    """
    named = {f"data.{split}": config.data.files(split) for split in (*SPLITS, "clusters")}
    benchmarks = config.trainer.benchmarks
    named["trainer.benchmarks"] = [each[name] for each in benchmarks for name in ("path", "wild_type") if name in each]
    for key, sources in named.items():
        _check(site, f"{key}: ", [source for source in sources if Path(source).is_absolute()], [run.parent])


def check_files(site: Site, words: Sequence[str], mounted: Sequence[Path]) -> None:
    """Refuse a job with files among its words, as they are typed here, that lie outside of what is mounted.

    mounted: for this job, besides the profile's mounts.

    Raises:
        ConfigError: naming the first one, and for a folder that no container can be given.
    """
    odd = next((path for path in mounted if ":" in str(path)), None)
    if site.container != "none" and odd:
        raise ConfigError(f"{odd}: a folder that a container is to see cannot hold a ':': choose another one.")
    values = (word.partition("=")[2] if word.startswith("--") else word for word in words)
    _check(site, "", [value for value in values if value and Path(value).exists()], mounted)


def _check(site: Site, key: str, files: Iterable[str], mounted: Sequence[Path]) -> None:
    if site.container == "none":
        return
    seen = list(mounted)
    for mount in site.container_mounts:
        host, _, inside = mount.partition(":")
        if inside.partition(":")[0] in ("", host):  # under another name it does not help: paths are those of the host
            seen.append(Path(host))
    for file in files:
        path = Path(os.path.abspath(file))  # noqa: PTH100 (links are followed in the container)
        if not any(path.is_relative_to(folder) for folder in seen):
            raise ConfigError(
                f"{key}{file} is not in the container: add {path.parent} to container_mounts of the site's profile."
            )
