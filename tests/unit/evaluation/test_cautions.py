"""What is said beside a figure that should not be believed as it stands."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae.evaluation.cautions import cautions, hubness, trained_files
from audiomae.evaluation.protocol import ProtocolConfig
from audiomae.evaluation.rows import LabelledRows
from audiomae.evaluation.runs import RunResult, evaluate_rows


def rows(vectors: np.ndarray, labels: list[str]) -> LabelledRows:
    count = len(vectors)
    return LabelledRows(
        name="run",
        vectors=(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32),
        labels=np.array(labels),
        groups=None,
        uris=np.array([f"{number}.wav" for number in range(count)]),
        spans=np.tile([0.0, 1.0], (count, 1)),
        corpus_root="/sounds",
    )


def evaluated(count: int, hub: bool = False, classes: int = 2) -> RunResult:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(count, 40))
    if hub:  # five vectors in the middle of all others
        vectors += 0.0
        vectors[:5] = vectors.mean(0) + 1e-3 * draw.normal(size=(5, 40))
        vectors[5:] += 0.6
        vectors[:5] += 0.6
    return evaluate_rows(rows(vectors, [f"c{number % classes}" for number in range(count)]), ProtocolConfig())


def test_hubs_are_measured_and_said() -> None:
    plain, hub = evaluated(200), evaluated(200, hub=True)
    assert hubness(plain)["skew"] < 1.5 < 3 < hubness(hub)["skew"]
    assert hubness(hub)["largest"] > 0.5 and hubness(hub)["k"] == 10
    assert cautions(plain) == []
    (said,) = cautions(hub)
    assert said.startswith("hubs: one row is among the first 10 of ") and "silent or broken clips" in said


def test_few_queries_and_one_label_are_said() -> None:
    assert any("only 8 queries: each is 12 points of R@1" in line for line in cautions(evaluated(8)))
    assert any("every row has the same label" in line for line in cautions(evaluated(40, classes=1)))


def test_queries_that_were_trained_on_are_counted_and_the_others_scored_apart() -> None:
    run = evaluated(40)
    trained = {f"/sounds/{number}.wav" for number in range(34)}
    (said,) = cautions(run, trained)
    hits = int(np.nansum(run.scores.values["R@1"][34:]))
    assert said.startswith("34 of 40 queries were trained on") and f"6 held-out ones alone: R@1 {hits} of 6" in said
    assert "none was held out" in cautions(run, {f"/sounds/{number}.wav" for number in range(40)})[0]
    elsewhere = dataclasses.replace(run, rows=dataclasses.replace(run.rows, corpus_root="/other"))
    assert cautions(elsewhere, trained) == []


def test_what_an_encoder_was_trained_on_lies_beside_it(tmp_path: Path) -> None:
    items = pa.table({"uri": ["a.wav", "b.wav"], "validation": [False, True]})
    pq.write_table(items.replace_schema_metadata({"corpus_root": "/sounds"}), tmp_path / "items.parquet")
    assert trained_files(str(tmp_path / "encoder")) == {"/sounds/a.wav"}
    assert trained_files("official:somewhere") == trained_files(str(tmp_path / "x" / "encoder")) == set()


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_sets_do_not_break_it(count: int) -> None:
    assert isinstance(cautions(evaluated(count + 1)), list)
