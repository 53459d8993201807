"""Strict, frozen configuration: YAML files, then `--set a.b=c`, then flags; unknown keys name the one that was meant.

Every configurable part of the product defines its own `StrictConfig` next to the code it configures; this module
only knows how to read, merge, check, list and write them. The command line (`audiomae/cli.py`) and the config
reference (`docs/config.md`) are generated from the same fields.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from audiomae.errors import ConfigError

LIKE_ENOUGH, SIBLING_BONUS = 0.7, 0.2  # a misspelt key is more often one of its neighbours than one elsewhere


class StrictConfig(BaseModel):
    """Base of every config: immutable, no unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def also_called(*names: str) -> dict[str, Any]:
    """`json_schema_extra` of a field that people know by other names: a hint for those leads here."""
    return {"aka": list(names)}


def output(metavar: str) -> dict[str, Any]:
    """`json_schema_extra` of a field that names a place the job writes to."""
    return {"metavar": metavar, "writes": True}


def shown_as(metavar: str, *flags: str) -> dict[str, Any]:
    """`json_schema_extra` of a field whose flag has this placeholder in the help, and perhaps further spellings."""
    return {"metavar": metavar, "flags": list(flags)}


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


@dataclass(frozen=True)
class Key:
    """One setting of a config: its dotted name and the field that declares it."""

    name: str
    field: FieldInfo
    owner: type[BaseModel]

    @property
    def last(self) -> str:
        """The name without its parents."""
        return self.name.rpartition(".")[2]

    @property
    def default(self) -> Any:
        """What it is when nothing is said; None for a required key."""
        return None if self.field.is_required() else self.field.get_default(call_default_factory=True)

    def extra(self, name: str) -> Any:
        """What the field's `json_schema_extra` says under `name`: `metavar`, `aka`, `flags`, `writes`."""
        extra = self.field.json_schema_extra
        return extra.get(name) if isinstance(extra, dict) else None


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
    return build_config(cls, resolve_tree(files, sets, overrides))


def resolve_tree(
    files: Sequence[str | Path] = (), sets: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `load_config` builds its config from: the merged mapping, not checked yet."""
    tree: dict[str, Any] = {}
    for file in files:
        tree = merged(tree, _read_yaml(Path(file)))
    for item in sets:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {item!r}: expected KEY=VALUE, for example --set model.depth=4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML: {error}") from None
        tree = merged(tree, _nested(key, value))
    for key, value in (overrides or {}).items():
        if value is not None:
            tree = merged(tree, _nested(key, value))
    return tree


def build_config(cls: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Validate a plain mapping as `cls`; `ConfigError` instead of pydantic's error."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(cls, detail) for detail in error.errors())
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: StrictConfig) -> str:
    """The resolved config as YAML text, every default spelled out; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree: `tree` with `changes` laid over it, mappings key by key."""
    result = dict(tree)
    for key, value in changes.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return result


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys and values; an empty mapping stays a value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}{name}.").items()}


def config_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every setting of a config and of the configs inside it, in the order of their declaration.

    A field that holds another config gives that config's keys, not one of its own; a field that may hold one of
    several gives the keys of all of them, each name once.
    """
    seen: set[str] = set()
    for name, field in cls.model_fields.items():
        models = _models_of(field.annotation)
        keys = [Key(prefix + name, field, cls)]
        if models:
            keys = [key for model in models for key in config_keys(model, f"{prefix}{name}.")]
        for key in keys:
            if key.name not in seen:
                seen.add(key.name)
                yield key


def nearest(name: str, names: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or the list of them when nothing is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(sorted(names))}"


def meant_keys(cls: type[BaseModel], name: str) -> list[str]:
    """The keys, anywhere in the config, that somebody who wrote `name` may have meant, best first.

    Keys of that very name (or known by it elsewhere, such as `learning_rate` for `optim.lr`) at another place of the
    tree; else those whose own name is spelt most alike, beginning with its neighbours.
    """
    keys = list(config_keys(cls))
    parent, _, last = name.rpartition(".")
    words = last.replace("-", "_").lower()
    same = [key.name for key in keys if words == key.last or words in (key.extra("aka") or ())]
    if same:
        return same
    siblings = {
        name: f"{parent}.{name}" if parent else name for name in _fields_at(cls, parent.split(".") if parent else [])
    }
    anywhere = {spelling: key.name for key in reversed(keys) for spelling in (key.last, *(key.extra("aka") or ()))}
    scored = [(_likeness(words, name) + SIBLING_BONUS, found) for name, found in siblings.items()]
    scored += [(_likeness(words, name), found) for name, found in anywhere.items()]
    best = max(scored, default=(0.0, ""))
    return [best[1]] if best[0] > LIKE_ENOUGH else []


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: expected a mapping at the top level, got {type(tree).__name__}")
    return tree


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return dict(value)


def _explain(cls: type[BaseModel], detail: Any) -> str:
    location = _without_tags(cls, [str(part) for part in detail["loc"]])
    key = ".".join(location) or "(top level)"
    if detail["type"] != "extra_forbidden":
        return f"config key {key!r}: {detail['msg']}, got {detail.get('input')!r}"
    given = detail.get("input")
    names = list(flat({key: given})) if isinstance(given, Mapping) and given else [key]
    return "\n".join(_unknown(cls, name) for name in names)


def _unknown(cls: type[BaseModel], name: str) -> str:
    meant = meant_keys(cls, name)
    if meant:
        return f"unknown config key {name!r}; did you mean " + " or ".join(repr(found) for found in meant[:3]) + "?"
    fields = _fields_at(cls, name.split(".")[:-1]) or list(cls.model_fields)
    return f"unknown config key {name!r}; valid names: {', '.join(sorted(fields))}"


def _without_tags(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The location of an error less what names a member of a union: `backbone.audiomae.depth` -> `backbone.depth`."""
    models: list[type[BaseModel]] = [cls]
    kept = []
    for part in location:
        holders = [model for model in models if part in model.model_fields]
        tag = len(models) > 1 and not holders
        if tag:
            models = [model for model in models if _is_tag(model, part)] or models
            continue
        kept.append(part)
        models = [inner for model in holders for inner in _models_of(model.model_fields[part].annotation)]
    return kept


def _is_tag(model: type[BaseModel], part: str) -> bool:
    return model.__name__ == part or any(
        part in get_args(field.annotation) for field in model.model_fields.values() if field.annotation is not None
    )


def _fields_at(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    models: list[type[BaseModel]] = [cls]
    for part in location:
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models_of(model.model_fields[part].annotation)
        ]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The configs that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in _models_of(member)]
    return []
