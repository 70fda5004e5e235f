"""DeepSpeed's own configuration, made from ours and the ``deepspeed`` section, and tried before anything is started."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from longseq.config.schema import Config
from longseq.config.yaml_files import first_line
from longseq.data import vocabulary
from longseq.errors import ConfigError
from longseq.measure.memory import reduce_bucket


def deepspeed_settings(config: Config, *, on_cuda: bool) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets, but for the precision, which Lightning adds where it is not here."""
    trainer, given = config.trainer, config.deepspeed
    zero = dict(given.get("zero_optimization", {}))
    zero["stage"] = trainer.zero_stage
    # DeepSpeed would take 2 GB for any model.
    parameters = config.performer_spec(vocabulary(config).size).parameter_count
    zero.setdefault("reduce_bucket_size", reduce_bucket(config, parameters))
    if trainer.overlap_comm is not None:
        zero["overlap_comm"] = trainer.overlap_comm
    for name, device in (("offload_optimizer", trainer.offload_optimizer), ("offload_param", trainer.offload_params)):
        if device != "none":
            place: dict[str, Any] = {"device": device, "pin_memory": on_cuda}
            if device == "nvme":
                place["nvme_path"] = trainer.offload_path
            zero[name] = {**zero.get(name, {}), **place}
    settings = {
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would insist on its own CPU Adam where the optimiser is offloaded; optim.implementation has it.
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": config.batch_sequences,
        "gradient_clipping": config.optim.clip,
        **given,
        "zero_optimization": zero,
    }
    if "fp16" in given:
        settings["fp16"] = {**given["fp16"], "enabled": True}
    return settings


def check_deepspeed(config: Config) -> None:
    """Have DeepSpeed read its configuration, in this process and without starting anything.

    Raises:
        ConfigError: for a key that DeepSpeed does not know, with the nearest one that it does, and for a value that
            it refuses.
    """
    if config.trainer.strategy != "deepspeed" or not config.deepspeed:
        return
    from longseq.devices import on_cuda

    cuda = on_cuda(config)
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
        from pydantic import ValidationError

        asked = _Asked(deepspeed_settings(config, on_cuda=cuda))
        try:
            DeepSpeedConfig(asked)
        except ValidationError as error:
            raise _refused(config, error) from None
        except Exception as error:  # whatever DeepSpeed's own checks raise is about its configuration
            raise ConfigError(f"deepspeed: {first_line(error)}.") from None
    finally:
        logging.disable(logging.NOTSET)
    for path, name, known in asked.unasked():
        if _holds(config.deepspeed, path):
            raise _unknown(".".join(("deepspeed", *path, name)), name, known)


class _Asked(dict[str, Any]):
    """A dictionary that knows which keys it was asked for: DeepSpeed ignores those that it does not know."""

    def __init__(self, content: Mapping[str, Any], path: tuple[str, ...] = ()):
        super().__init__({k: _Asked(v, (*path, k)) if isinstance(v, Mapping) else v for k, v in content.items()})
        self.path = path
        self.asked: set[str] = set()

    def __getitem__(self, name: Any) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: Any) -> bool:
        self.asked.add(name)
        return super().__contains__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        if self.path:  # ** asks for all of a section: then a pydantic model looks at them, and refuses by itself
            self.asked.update(super().keys())
        return super().keys()

    def __iter__(self) -> Iterator[Any]:  # without it Python would not call keys() for **
        return super().__iter__()

    def __copy__(self) -> _Asked:
        return self

    def unasked(self) -> Iterator[tuple[tuple[str, ...], str, set[str]]]:
        """(section, key, keys that are known there) of every key that nothing asked for."""
        for name, value in self.items():
            if name not in self.asked:
                yield self.path, name, self.asked
            elif isinstance(value, _Asked) and value.asked:
                yield from value.unasked()


def _holds(section: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(section.get(name), Mapping):
            return False
        section = section[name]
    return True


def _refused(config: Config, error: Any) -> ConfigError:
    """A pydantic error as one sentence. Its place lacks the names of the sections above the model."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    prefix = next((path for path in _sections(config.deepspeed) if _has(config.deepspeed, [*path, *place])), ())
    name = ".".join(("deepspeed", *prefix, *place))
    if problem["type"] == "extra_forbidden":
        return _unknown(name, place[-1], _known_fields(error.title, place[:-1]))
    return ConfigError(f"{name}={problem.get('input')}: {problem['msg']}.")


def _sections(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _sections(value, (*path, name))


def _has(section: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(section, Mapping) or name not in section:
            return False
        section = section[name]
    return True


def _known_fields(title: str, sections: list[str]) -> set[str]:
    """The fields of a section, below DeepSpeed's configuration model of that name."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    pending: list[Any] = [DeepSpeedConfigModel]
    while pending:
        model = pending.pop()
        pending += model.__subclasses__()
        if model.__name__ == title:
            for section in sections:
                kinds = (model.model_fields[section].annotation, *get_args(model.model_fields[section].annotation))
                model = next(kind for kind in kinds if hasattr(kind, "model_fields"))
            return {field.alias or name for name, field in model.model_fields.items()}
    return set()


def _unknown(full: str, name: str, known: set[str]) -> ConfigError:
    near = difflib.get_close_matches(name, sorted(map(str, known)), n=1)
    hint = f"Did you mean {full.removesuffix(name)}{near[0]}?" if near else "Its documentation lists them."
    return ConfigError(f"{full}: DeepSpeed knows no such key. {hint}")
