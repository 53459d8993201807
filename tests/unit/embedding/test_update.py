"""A corpus that changed: what differs, what is embedded again, what is copied, what is marked as vanished."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from audiomae.artifacts.embeddings import (
    EmbeddingSet,
    ShardOrigin,
    ShardTables,
    collect_garbage,
    commit_shard,
    write_run,
)
from audiomae.artifacts.tables import FAILURE_SCHEMA, EmbedSettings, embedding_schema, vectors_to_column
from audiomae.corpus.manifest import clip_id
from audiomae.embedding import plan as planning
from audiomae.embedding.listing import Listing
from audiomae.embedding.update import copy_shard, difference, updated_plan

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=2, sample_rate=16000, mode="windows", window_s=5, hop_s=5)
REQUEST = planning.PlanRequest("enc", "src", "/root", shard_cost_s=10)


def listing(files: dict[str, str], **columns: list[Any]) -> Listing:
    """{uri: content} -> a listing."""
    table = pa.table(
        {"uri": list(files), "size": [160_000] * len(files), "content_id": list(files.values()), **columns}
    )
    return Listing([table])


def no_probe(uris: list[str]) -> list[float | None]:
    return [None] * len(uris)


def updated(out: Path, plan: planning.Plan, listing: Listing, failed: Sequence[str] = ()) -> planning.Plan:
    changes = difference(out, plan, listing).model_copy(update={"failed": list(failed)})
    return updated_plan(out, plan, listing, no_probe, REQUEST, changes)


def vector_of(uri: str, content: str) -> list[float]:
    return [float(sum(uri.encode())), float(sum(content.encode()))]


def carry_out(out: Path, plan: planning.Plan, bad: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Commit the plan as the job would; returns the uris that were embedded (not copied)."""
    embedded = []
    for entry in plan.shards:
        if (out / "commits" / f"{entry.name}.json").exists():
            continue
        if entry.base:
            assert copy_shard(str(out), plan, entry)
            continue
        items = planning.read_shard_items(str(out), entry)
        embedded += items["uri"].to_pylist()
        good = items.filter(pa.array([uri not in bad for uri in items["uri"].to_pylist()]))
        rows = good.to_pylist()
        extra = [items.schema.field(name) for name in planning.extra_columns(items)]
        vectors = np.array([vector_of(row["uri"], row["content_id"]) for row in rows], np.float32).reshape(-1, 2)
        columns = [
            pa.array([clip_id(row["uri"], 0.0, 5.0) for row in rows], pa.int64()),
            good["uri"],
            pa.array(np.zeros(len(rows))),
            pa.array(np.full(len(rows), 5.0)),
            vectors_to_column(vectors),
            *(good[field.name] for field in extra),
        ]
        failed = [{"uri": uri, "error_class": "EmptyFile"} for uri in items["uri"].to_pylist() if uri in bad]
        commit_shard(
            out,
            entry.name,
            ShardTables(
                pa.Table.from_arrays(columns, schema=embedding_schema(SETTINGS, extra)),
                pa.Table.from_pylist(failed, FAILURE_SCHEMA),
            ),
            ShardOrigin(
                inputs=entry.items,
                audio_s=5.0 * len(rows),
                fingerprint=SETTINGS.fingerprint,
                manifest=plan.manifest_hash,
            ),
        )
    return embedded


@pytest.fixture
def first(tmp_path: Path) -> tuple[Path, planning.Plan, dict[str, str]]:
    """Twenty embedded files, two of which failed."""
    files = {f"{number:02d}.wav": "v1" for number in range(20)}
    plan = planning.new_plan(tmp_path, listing(files), SETTINGS, no_probe, REQUEST)
    assert len(plan.shards) > 4
    write_run(tmp_path, SETTINGS.model_dump(exclude_defaults=True) | {"encoder": "enc", "corpus_root": "/root"})
    carry_out(tmp_path, plan, bad={"03.wav", "04.wav"})
    return tmp_path, plan, files


def contents(out: Path) -> dict[str, list[float]]:
    table = EmbeddingSet.open(out).read()
    assert len(set(table["id"].to_pylist())) == table.num_rows
    return dict(zip(table["uri"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def test_an_unchanged_listing_does_not_differ(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    assert not difference(out, plan, listing(files))


def test_an_update_embeds_only_what_is_new_or_changed(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    del files["00.wav"], files["11.wav"]
    files |= {"07.wav": "v2", "new.wav": "v1"}
    found = difference(out, plan, listing(files))
    assert (found.new, found.changed, found.vanished) == (["new.wav"], ["07.wav"], ["00.wav", "11.wav"])
    assert "1 new (e.g. new.wav)" in found.describe()

    after = updated(out, plan, listing(files))
    untouched = {entry.name for entry in plan.shards} & {entry.name for entry in after.shards}
    assert len(untouched) >= len(plan.shards) - 3
    assert sorted(carry_out(out, after)) == ["07.wav", "new.wav"]

    expected = {uri: vector_of(uri, content) for uri, content in files.items() if uri not in ("03.wav", "04.wav")}
    assert contents(out) == expected
    embeddings = EmbeddingSet.open(out)
    assert embeddings.complete and sorted(embeddings.failures()["uri"].to_pylist()) == ["03.wav", "04.wav"]
    assert sorted(embeddings.vanished()["uri"].to_pylist()) == ["00.wav", "11.wav"]
    assert embeddings.vanished()["id"].to_pylist() == [
        clip_id(uri, 0, 5) for uri in embeddings.vanished()["uri"].to_pylist()
    ]

    assert collect_garbage(out) > 0
    assert contents(out) == expected and EmbeddingSet.open(out).complete


def test_files_that_come_back_are_embedded_and_no_longer_vanished(
    first: tuple[Path, planning.Plan, dict[str, str]],
) -> None:
    out, plan, files = first
    content = files.pop("00.wav")
    plan = updated(out, plan, listing(files))
    carry_out(out, plan)
    assert EmbeddingSet.open(out).vanished().num_rows == 1
    collect_garbage(out)
    files["00.wav"] = content
    plan = updated(out, plan, listing(files))
    assert carry_out(out, plan) == ["00.wav"]
    assert EmbeddingSet.open(out).vanished().num_rows == 0
    assert len(contents(out)) == 18


def test_failed_files_alone_are_tried_again(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    plan = updated(out, plan, listing(files), failed=["03.wav", "04.wav"])
    assert sorted(carry_out(out, plan, bad={"04.wav"})) == ["03.wav", "04.wav"]
    assert len(contents(out)) == 19
    assert EmbeddingSet.open(out).failures()["uri"].to_pylist() == ["04.wav"]


def test_new_labels_are_taken_over_without_embedding(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    labelled = listing(files, label=[f"label{number % 2}" for number in range(20)])
    assert "columns added: label" in difference(out, plan, labelled).describe()
    plan = updated(out, plan, labelled)
    assert carry_out(out, plan) == []
    table = EmbeddingSet.open(out).read()
    assert dict(zip(table["uri"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        uri: f"label{int(uri[:2]) % 2}" for uri in table["uri"].to_pylist()
    }
    relabelled = listing(files, label=["label0"] * 20)
    found = difference(out, plan, relabelled)
    assert len(found.relabelled) == 10 and "10 with other columns" in found.describe()


def test_an_update_of_an_unfinished_update_loses_nothing(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    del files["00.wav"]
    plan = updated(out, plan, listing(files))  # killed before anything was committed
    del files["01.wav"]
    files["late.wav"] = "v1"
    plan = updated(out, plan, listing(files))
    assert carry_out(out, plan) == ["late.wav"]
    assert sorted(contents(out)) == sorted(uri for uri in files if uri not in ("03.wav", "04.wav"))
    assert sorted(EmbeddingSet.open(out).vanished()["uri"].to_pylist()) == ["00.wav", "01.wav"]


def test_columns_are_compared_value_by_value(first: tuple[Path, planning.Plan, dict[str, str]]) -> None:
    out, plan, files = first
    columns: dict[str, list[Any]] = {
        "fold": [None if number == 3 else number for number in range(20)],
        "level": [float("nan") if number == 4 else number / 2 for number in range(20)],
        "tags": [["a", str(number)] for number in range(20)],
    }
    plan = updated(out, plan, listing(files, **columns))
    assert not difference(out, plan, listing(files, **columns))
    for name, row, value in (("fold", 3, 5), ("level", 4, 1.0), ("tags", 5, ["b"])):
        changed = {**columns, name: [value if number == row else old for number, old in enumerate(columns[name])]}
        found = difference(out, plan, listing(files, **changed))
        assert found.relabelled == [f"{row:02d}.wav"] and not found.changed
