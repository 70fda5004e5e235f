"""Whether a container would see the files that a run needs."""

from __future__ import annotations

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
    if site.container == "none":
        return
    seen = [run.parent]
    for mount in site.container_mounts:
        host, _, inside = mount.partition(":")
        if inside.partition(":")[0] in ("", host):  # under another name it does not help: paths are those of the host
            seen.append(Path(host))
    named = {f"data.{split}": config.data.files(split) for split in (*SPLITS, "clusters")}
    benchmarks = config.trainer.benchmarks
    named["trainer.benchmarks"] = [each[name] for each in benchmarks for name in ("path", "wild_type") if name in each]
    for key, sources in named.items():
        for source in sources:
            path = Path(source)
            if path.is_absolute() and not any(path.is_relative_to(folder) for folder in seen):
                raise ConfigError(
                    f"{key}: {source} is not in the container: add {path.parent} to container_mounts of the "
                    "site's profile."
                )
