"""The configurations that come with longseq, by their names: ``protein/base`` is ``configs/protein/base.yaml``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longseq.errors import ConfigError


def folder(module: str = __file__, source: str = "configs", holds: str = "protein/base.yaml") -> Path:
    """Files that come with longseq: next to the ``module`` that reads them where it is installed from a wheel, else
    ``source`` at the checkout's root; the place that ``holds`` one of them.

    Raises:
        ConfigError: if they are not there.
    """
    installed, root = Path(module).resolve().with_name("files"), Path(__file__).resolve().parents[3]
    for place in (installed, root / source):
        if (place / holds).is_file():
            return place
    raise ConfigError(f"{installed}: {holds} is missing: install longseq again.")


def shipped() -> dict[str, Path]:
    """Every configuration by its name, in order."""
    root = folder()
    files = {str(file.relative_to(root).with_suffix("")): file for file in root.glob("*/*.yaml")}
    return dict(sorted(files.items()))


def located(path: Path | str) -> Path:
    """``path`` where it is a file; else the file that comes with longseq under this name, with or without ``configs/``
    in front and ``.yaml`` behind; else ``path``, for the reader to refuse."""
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    return shipped().get(name, path) if name.count("/") == 1 else path


def with_bases(path: Path) -> Iterator[Path]:
    """A configuration that comes with longseq, and those that it extends or experiments with."""
    import yaml

    yield path
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("extends", "config"):
        for base in [values[key]] if isinstance(values.get(key), str) else values.get(key, []):
            yield from with_bases((path.parent / base).resolve())
