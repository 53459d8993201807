"""Rows of an ablation: inheritance, what names a run, and the table that is made of the results."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from audiomae.config import merged, resolve_tree
from audiomae.errors import ConfigError
from audiomae.evaluation.ablation import RowResults, difference, render_table
from ray_jobs.ablate.job import _corpus_hash
from ray_jobs.ablate.rows import config_trees, load_rows, plan_units, selected

RECIPES = Path(__file__).resolve().parents[3] / "ray_jobs" / "recipes"


@pytest.fixture
def folder(tmp_path):
    def write(**rows):
        for name, row in rows.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"technique": name, "section": "s"} | row))
        return tmp_path

    return write


def units_of(rows, folds=("1", "2"), seeds=(0,), corpus_hash="c", sets=()):
    trees = config_trees(rows, resolve_tree([RECIPES / "debug.yaml"], sets))
    return plan_units(rows, trees, folds, seeds, "fold", corpus_hash)


def test_rows_inherit_down_their_line_and_parents_come_first(folder):
    path = folder(
        a_child={"parent": "plain", "changes": {"objective": {"uniformity": 0.1}}},
        base={"parent": None},
        plain={"changes": {"objective": {"contrastive": 0.0}, "epochs": 7}},
    )
    rows = load_rows(path)
    assert list(rows).index("base") < list(rows).index("plain") < list(rows).index("a_child")
    trees = config_trees(rows, resolve_tree([RECIPES / "debug.yaml"], ["batch_size=16"]))
    assert trees["base"]["objective"] == {"mae": 1.0, "contrastive": 0.1}
    assert trees["a_child"]["objective"] == {"mae": 1.0, "contrastive": 0.0, "uniformity": 0.1}
    assert (trees["a_child"]["epochs"], trees["a_child"]["batch_size"]) == (7, 16)
    assert selected(rows, ["plain"]) == ["base", "plain"]


def test_a_unit_leaves_its_fold_out_and_carries_its_seed(folder):
    units = units_of(load_rows(folder(base={"parent": None})), seeds=(0, 5))
    assert [(u.fold, u.seed) for u in units] == [("1", 0), ("2", 0), ("1", 5), ("2", 5)]
    assert units[3].config["seed"] == 5 and units[3].config["data"]["exclude"] == {"fold": "2"}
    assert len({u.key for u in units}) == 4


def test_nothing_else_is_held_out_but_where_a_checkpoint_is_picked_by_it(folder):
    rows = load_rows(folder(base={"parent": None}))
    for export, expected in (("last", 0.0), ("best", 0.25)):
        (unit, *_) = units_of(rows, sets=["data.val_fraction=0.25", f"export={export}"])
        assert unit.config["data"]["val_fraction"] == expected


def test_the_key_changes_with_what_decides_the_result_and_with_nothing_else(folder):
    path = folder(
        base={"parent": None},
        cls={"method": "reuse", "changes": {"encoder": {"pooling": "cls"}}},
        other={"changes": {"epochs": 2}},
    )
    rows = load_rows(path)
    keys = {u.row: u.key for u in units_of(rows, folds=("1",))}
    assert keys == {u.row: u.key for u in units_of(rows, folds=("1",))}
    changed = {u.row: u.key for u in units_of(rows, folds=("1",), sets=["optim.lr=1e-4"])}
    assert all(keys[name] != changed[name] for name in keys)
    moved = {u.row: u.key for u in units_of(rows, folds=("1",), corpus_hash="other")}
    assert all(keys[name] != moved[name] for name in keys)
    folder(base={"parent": None, "technique": "another title", "guess": "?"})
    assert keys == {u.row: u.key for u in units_of(load_rows(path), folds=("1",))}


def test_only_rows_that_others_build_on_keep_their_encoder(folder):
    rows = load_rows(folder(base={"parent": None}, other={}, cls={"method": "reuse"}, tune={"method": "continue"}))
    kept = {u.row: (u.keep_encoder, u.parent) for u in units_of(rows)}
    assert kept == {"base": (True, None), "other": (False, None), "cls": (False, "base"), "tune": (False, "base")}


def test_baselines_run_once_whatever_the_seeds(folder):
    rows = load_rows(folder(base={"parent": None}, mfcc={"parent": None, "method": "mfcc"}))
    assert sum(u.row == "mfcc" for u in units_of(rows, seeds=(0, 1, 2))) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"parent": "b"}, "b": {"parent": "a"}}, "circle"),
        ({"base": {"parent": None}, "a": {"parent": "bass"}}, "did you mean 'base'"),
        ({"base": {"parent": None, "method": "reuse"}}, "expected a parent of method"),
        ({"base": {"parent": None}, "a": {"method": "reuse"}, "b": {"parent": "a", "method": "reuse"}}, "row b"),
        ({"base": {"parent": None, "techniques": "x"}}, "did you mean 'technique'"),
        ({}, "nothing to compare"),
    ],
)
def test_bad_rows_are_named(folder, rows, message):
    with pytest.raises(ConfigError, match=message):
        load_rows(folder(**rows))


def test_a_bad_change_names_its_row(folder):
    rows = load_rows(folder(base={"parent": None}, typo={"changes": {"objective": {"contrastiv": 1}}}))
    with pytest.raises(ConfigError, match=r"row typo: .*did you mean 'objective.contrastive'"):
        config_trees(rows, resolve_tree([RECIPES / "debug.yaml"]))
    with pytest.raises(ConfigError, match="--only bas"):
        selected(rows, ["bas"])


def test_merging_leaves_its_inputs_alone():
    tree = {"a": {"b": 1, "c": 2}}
    assert merged(tree, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert tree == {"a": {"b": 1, "c": 2}}


def results(name, shift, parent=None, folds=5, seeds=2, expected=10, **extra):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.6, (folds, 20))
    runs = {}
    for fold in range(folds):
        for seed in range(seeds):
            noise = np.random.default_rng([fold, seed, len(name)]).normal(0, 0.01, 20)
            precision = base[fold] + shift + noise
            queries = {f"{fold}-{i}": {"AP": float(ap), "R@1": float(ap > 0.5)} for i, ap in enumerate(precision)}
            metrics = {"mAP": float(precision.mean()), "R@1": float((precision > 0.5).mean())}
            runs[(str(fold), seed)] = {"metrics": metrics, "queries": queries}
    about = {"technique": name, "section": "Section", "guess": "", "note": ""} | extra
    return RowResults(name=name, parent=parent, expected_runs=expected, runs=runs, **about)


def test_differences_are_paired_so_that_folds_cancel():
    found = difference(results("better", 0.05, "base"), results("base", 0.0))
    assert found.pairs == 10
    assert found.mean["mAP"] == pytest.approx(0.05, abs=0.005)
    assert found.std["mAP"] < 0.006  # far below the spread over folds
    assert found.relative == pytest.approx(0.05 / 0.45, abs=0.03)
    assert found.test.num_queries == 100 and found.test.p_value < 0.001


def test_only_shared_runs_are_compared():
    found = difference(results("part", 0.05, "base", folds=2), results("base", 0.0))
    assert found.pairs == 4 and found.test.num_queries == 40
    assert difference(RowResults("x", "x", "s", "base", "", "", 10, {}), results("base", 0.0)) is None


def test_the_table_says_everything_once():
    rows = [
        results("base", 0.0),
        results("better", 0.05, "base", guess="+5-15%", note="trained anew"),
        results("half | done", 0.0, "base", folds=2, seeds=1, section="Other"),
        RowResults("missing", "missing", "Other", "base", "", "", 10, {}),
    ]
    text = render_table(rows, "A preface.", {"missing/fold-1-seed-0": "out of memory"})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "+5-15%" in lines["better"] and "| base | 10 |" in lines["better"] and "< 0.001" in lines["better"]
    assert "| 2 of 10 |" in text and "half \\| done" in text
    assert "| missing | base | 0 of 10 |" in text
    assert "- better: trained anew" in text and "- missing/fold-1-seed-0: out of memory" in text
    assert text.index("## Section") < text.index("## Other") < text.index("fold by fold")
    widths = {
        line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ") and "±" in line
    }
    assert widths == {10, 8}


def test_the_rows_that_ship_are_valid():
    rows = load_rows(RECIPES / "ablations")
    config_trees(rows, resolve_tree([RECIPES / "esc10.yaml"]))
    assert rows["base"].parent is None


def test_a_corpus_is_known_by_its_bytes_labels_and_folds(tmp_path):
    def hashed(**columns):
        rows = {"uri": ["a.wav"], "content_id": ["1-2"], "label": ["rain"], "fold": [1]} | columns
        return _corpus_hash(str(tmp_path), pa.table(rows), "label", "fold")

    (tmp_path / "a.wav").write_bytes(b"sound")
    first = hashed()
    os.utime(tmp_path / "a.wav", (1, 1))
    assert hashed(content_id=["1-1"]) == first  # copied or touched: what was measured on it stands
    assert len({first, hashed(label=["sea"]), hashed(fold=[2])}) == 3
    (tmp_path / "a.wav").write_bytes(b"other")
    assert hashed() != first
    there_is_no_file = hashed(uri=["b.wav"])
    assert hashed(uri=["b.wav"], content_id=["etag"]) != there_is_no_file
