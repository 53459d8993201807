"""What an ablation consists of: rows (one YAML file each, a small difference to a parent) times folds times seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from audiomae.config import StrictConfig, build_config, merged, nearest
from audiomae.errors import ConfigError
from audiomae.storage import sha256_bytes
from audiomae.training.recipe import Recipe

BASE = "base"
Method = Literal["train", "reuse", "continue", "untrained", "mfcc", "logmel"]
NEEDS_PARENT, GIVES_WEIGHTS = ("reuse", "continue"), ("train", "continue")
SEEDLESS = ("mfcc", "logmel")


class Row(StrictConfig):
    """One line of the result table (`recipes/ablations/NAME.yaml`).

    Attributes:
        technique: what the reader sees.
        section: heading the row stands under.
        parent: row it differs from and is compared with; null = the recipe itself, compared with nothing.
        method: `train` = a run of its own; `reuse` = the parent's trained weights with `changes` applied, no training;
            `continue` = training that starts from the parent's weights; `untrained` = random weights; `mfcc`,
            `logmel` = classical baselines, no encoder.
        changes: keys of the training config that differ from the parent's.
        guess: what the research note expects of it.
        note: how it was handled, where that is not plain.
    """

    technique: str
    section: str
    parent: str | None = BASE
    method: Method = "train"
    changes: dict[str, Any] = {}
    guess: str = ""
    note: str = ""


@dataclass(frozen=True)
class Unit:
    """One measurement: a row, trained on all folds but `fold`, which asks. `key` names all that decides its result."""

    row: str
    fold: str
    seed: int
    method: Method
    config: dict[str, Any]
    parent: str | None
    key: str
    keep_encoder: bool

    @property
    def name(self) -> str:
        return f"{self.row}/fold-{self.fold}-seed-{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to be sent to a task."""
        return asdict(self)


def load_rows(folder: Path) -> dict[str, Row]:
    """All rows of a folder by name: `base` first, parents before children, otherwise in the order of their file names.

    Raises:
        ConfigError: an invalid file, a missing or circular parent, or one without weights where weights are needed.
    """
    rows = {}
    for file in sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != BASE, file.stem)):
        try:
            rows[file.stem] = build_config(Row, yaml.safe_load(file.read_text()) or {})
        except (ConfigError, yaml.YAMLError) as error:
            raise ConfigError(f"{file}: {error}") from None
    if not rows:
        raise ConfigError(f"{folder}: no *.yaml file, so there is nothing to compare")
    ordered: dict[str, Row] = {}
    for name in rows:
        for ancestor in reversed(_lineage(rows, name)):
            ordered.setdefault(ancestor, rows[ancestor])
    return ordered


def selected(rows: Mapping[str, Row], only: Sequence[str] | None) -> list[str]:
    """The named rows and their ancestors, in the order of `rows`; all of them without names."""
    for name in only or ():
        if name not in rows:
            raise ConfigError(f"--only {name}: no such row{nearest(name, list(rows))}")
    wanted = {ancestor for name in only or rows for ancestor in _lineage(rows, name)}
    return [name for name in rows if name in wanted]


def config_trees(rows: Mapping[str, Row], recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The training recipe of each row as a plain tree: the keys of `recipe`, then the changes down its lineage.

    The fold that asks is held out of each run, so nothing else is, but for a recipe that picks its best checkpoint.

    Raises:
        ConfigError: naming the row whose config is not valid.
    """
    trees: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        trees[name] = merged(recipe if row.parent is None else trees[row.parent], row.changes)
        try:
            config = build_config(Recipe, trees[name])
        except ConfigError as error:
            raise ConfigError(f"row {name}: {error}") from None
        if config.export == "last":
            trees[name] = merged(trees[name], {"data": {"val_fraction": 0.0}})
    return trees


def plan_units(
    rows: Mapping[str, Row],
    trees: Mapping[str, dict[str, Any]],
    folds: Sequence[str],
    seeds: Sequence[int],
    fold_column: str,
    corpus_hash: str,
) -> list[Unit]:
    """Every measurement, parents before the units that need their weights.

    Args:
        rows, trees: of the whole folder, parents first.
        folds: each asks once, of the others' models.
        seeds: of weights, order, augmentation and validation split.
        fold_column: manifest column of the folds.
        corpus_hash: names the clips, their labels and folds.
    """
    sources = {row.parent for row in rows.values() if row.method in NEEDS_PARENT}
    units = []
    for name, row in rows.items():
        # the weights a row builds on are decided by its ancestors' configs
        decided_by = [[rows[ancestor].method, trees[ancestor]] for ancestor in _weights_lineage(rows, name)]
        for seed in seeds[:1] if row.method in SEEDLESS else seeds:
            for fold in folds:
                units.append(
                    Unit(
                        row=name,
                        fold=fold,
                        seed=seed,
                        method=row.method,
                        config=merged(trees[name], {"seed": seed, "data": {"exclude": {fold_column: fold}}}),
                        parent=row.parent if row.method in NEEDS_PARENT else None,
                        key=_key([decided_by, fold, seed, corpus_hash]),
                        keep_encoder=name in sources,
                    )
                )
    return units


def _key(value: Any) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def _lineage(rows: Mapping[str, Row], name: str) -> list[str]:
    """The row and its ancestors, nearest first."""
    line: list[str] = []
    current: str | None = name
    while current is not None:
        if current in line:
            raise ConfigError(f"row {name}: its parents form a circle ({' -> '.join([*line, current])})")
        if current not in rows:
            raise ConfigError(f"row {line[-1]}: parent {current!r} does not exist{nearest(current, list(rows))}")
        line.append(current)
        current = rows[current].parent
    if rows[name].method in NEEDS_PARENT and (len(line) == 1 or rows[line[1]].method not in GIVES_WEIGHTS):
        raise ConfigError(
            f"row {name}: method {rows[name].method!r} takes its parent's trained weights: expected a parent of method "
            f"{' or '.join(GIVES_WEIGHTS)}"
        )
    return line


def _weights_lineage(rows: Mapping[str, Row], name: str) -> list[str]:
    """The row and those ancestors whose weights it builds on."""
    line = [name]
    while rows[line[-1]].method in NEEDS_PARENT:
        line.append(str(rows[line[-1]].parent))
    return line
