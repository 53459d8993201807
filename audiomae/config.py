"""Strict, frozen configuration: YAML files, then `--set a.b=c`, then flags; unknown keys name their nearest neighbour.

Every configurable part of the product defines its own `StrictConfig` next to the code it configures; this module
only knows how to read, merge, check and write them.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from audiomae.errors import ConfigError


class StrictConfig(BaseModel):
    """Base of every config: immutable, no unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def load_config(
    cls: type[ConfigT],
    files: Sequence[str | Path] = (),
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Resolve a config from YAML files (later wins), then `a.b=c` strings, then flag values by dotted key.

    Args:
        cls: the config class to build.
        files: YAML files, each a mapping; nested mappings are merged key by key.
        sets: `dotted.key=value` with the value in YAML syntax.
        overrides: dotted key -> value from command-line flags; `None` means "not given".

    Raises:
        ConfigError: naming the file or key, what was expected, what was got and the nearest valid name.
    """
    tree: dict[str, Any] = {}
    for file in files:
        _merge(tree, _read_yaml(Path(file)))
    for item in sets:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {item!r}: expected KEY=VALUE, for example --set model.depth=4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML: {error}") from None
        _set_dotted(tree, key, value)
    for key, value in (overrides or {}).items():
        if value is not None:
            _set_dotted(tree, key, value)
    return build_config(cls, tree)


def build_config(cls: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Validate a plain mapping as `cls`; `ConfigError` instead of pydantic's error."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, detail) for detail in error.errors())) from None


def dump_config(config: StrictConfig) -> str:
    """The resolved config as YAML text, every default spelled out; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def nearest(name: str, names: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or the list of them when nothing is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(sorted(names))}"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: expected a mapping at the top level, got {type(tree).__name__}")
    return tree


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    if isinstance(value, Mapping) and isinstance(tree.get(leaf), dict):
        _merge(tree[leaf], value)
    else:
        tree[leaf] = value


def _explain(cls: type[BaseModel], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "(top level)"
    if detail["type"] == "extra_forbidden":
        fields = _fields_at(cls, location[:-1])
        return f"unknown config key {key!r}" + (nearest(location[-1], fields) if fields else "")
    return f"config key {key!r}: {detail['msg']}, got {detail.get('input')!r}"


def _fields_at(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    current: type[BaseModel] | None = cls
    for part in location:
        field = current.model_fields.get(part) if current else None
        if field is None:
            continue  # a union tag or a list index inside the location
        models = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)]
        current = models[0] if models else None
    return list(current.model_fields) if current else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
