"""Carrying out a plan: finished parts are found again, damaged ones made again, training never sees held-out ids."""

from pathlib import Path

import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.artifacts import receipts
from audiomae.artifacts import releases as release
from audiomae.artifacts.receipts import FileEntry
from audiomae.errors import IntegrityError
from audiomae.search import build
from audiomae.search import index as ann
from audiomae.search.build_plan import BuildOptions, Plan, make_plan

DIM, ROWS = 16, 2000
CONFIG = BuildOptions(flat_max_rows=100)


@pytest.fixture
def work(tmp_path: Path) -> Plan:
    """The first build of two thousand rows, in two parts."""
    embeddings = make_set(tmp_path / "a", clusters(ROWS, DIM))
    found = make_plan([embeddings], None, np.zeros(0, np.int64), CONFIG)
    assert found is not None
    return found


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def run(work: Plan, parts: Path) -> str:
    for part in work.parts:
        build.write_rows(part, str(parts))
    trained = build.train(work.spec, work.parts, str(parts), seed=0)
    for part in work.parts:
        assert build.index_part(part, str(parts), trained)["rows"] == part.num_rows
    return trained


def test_what_is_finished_is_not_done_again(work: Plan, tmp_path: Path) -> None:
    run(work, tmp_path / "parts")
    before = stamps(tmp_path / "parts")
    run(work, tmp_path / "parts")
    assert stamps(tmp_path / "parts") == before


def test_unfinished_and_damaged_parts_are_made_again(work: Plan, tmp_path: Path) -> None:
    trained = run(work, tmp_path / "parts")
    before = {path.name: path.read_bytes() for path in Path(trained).parent.parent.rglob("*") if path.is_file()}
    one, two = (tmp_path / "parts" / part.key for part in work.parts)
    (one / "receipt.json").unlink()
    (one / "vectors.npy").write_bytes(b"half")
    index = next(two.glob("index-*")) / "index.faiss"
    index.write_bytes(index.read_bytes()[:-1])
    assert run(work, tmp_path / "parts") == trained
    after = {path.name: path.read_bytes() for path in Path(trained).parent.parent.rglob("*") if path.is_file()}
    assert after == before


def test_the_training_sample_has_no_held_out_id_and_no_row_twice(work: Plan, tmp_path: Path) -> None:
    for part in work.parts:
        build.write_rows(part, str(tmp_path))
    folders = [tmp_path / part.key for part in work.parts]
    ids = np.concatenate([np.load(folder / "ids.npy") for folder in folders])
    rows = np.concatenate([np.load(folder / "vectors.npy") for folder in folders])
    allowed = rows[~build.held_out(ids)]
    assert 0 < build.held_out(ids).sum() < ROWS / 20
    everything = build.sample(work.parts, str(tmp_path), 10 * ROWS, seed=0)
    np.testing.assert_array_equal(everything, allowed)
    some = build.sample(work.parts, str(tmp_path), 300, seed=1)
    assert len(some) == 300 == len(np.unique(some, axis=0))
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in allowed}


def test_a_shard_that_changes_meanwhile_is_refused(work: Plan, tmp_path: Path) -> None:
    path = next((tmp_path / "a" / "commits").iterdir())
    receipt = receipts.read(path)
    files = {name: FileEntry("0" * 64) for name in receipt.files}
    path.write_bytes(receipts.Receipt(files, receipt.facts).encode())
    with pytest.raises(IntegrityError, match="changed while it was indexed"):
        for part in work.parts:
            build.write_rows(part, str(tmp_path / "parts"))


def test_extending_equals_building_at_once_with_the_same_training(tmp_path: Path) -> None:
    vectors = clusters(ROWS, DIM)
    uris = [f"{row:06d}.wav" for row in range(ROWS)]
    first = make_set(tmp_path / "a", vectors[:1500], names=uris[:1500], columns={"take": range(1500)})
    second = make_set(tmp_path / "b", vectors[1500:], names=uris[1500:], columns={"take": range(1500, ROWS)})
    make_release(tmp_path / "index", [first], flat_max_rows=100)
    grown = make_release(tmp_path / "index", [second], flat_max_rows=100)
    assert grown is not None and grown.info["parent"] == "v000001"

    folder = Path(str(grown.path))
    rows = ann.read_rows(folder, 0, ROWS)
    np.testing.assert_array_equal(rows, ann.to_rows(vectors))
    ann.build_part(folder / ann.TRAINED_FILE, rows, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == (folder / ann.INDEX_FILE).read_bytes()


def test_parts_are_tidied_away(tmp_path: Path) -> None:
    embeddings = make_set(tmp_path / "a", clusters(ROWS, DIM))
    make_release(tmp_path / "index", [embeddings], flat_max_rows=100)
    old = make_plan([embeddings], None, np.zeros(0, np.int64), CONFIG)
    assert old is not None
    new = make_plan([embeddings], None, np.zeros(0, np.int64), CONFIG.model_copy(update={"min_parts": 3}))
    assert new is not None
    parts = tmp_path / "index" / "parts"
    for part in new.parts:
        build.write_rows(part, str(parts))
    build.tidy(str(parts), new, keep_parts=True)
    assert {path.name for path in parts.iterdir()} == {part.key for part in new.parts}
    build.tidy(str(parts), new, keep_parts=False)
    assert list(parts.iterdir()) == []
    assert release.resolve(tmp_path / "index").version == "v000001"
