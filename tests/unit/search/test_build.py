"""Carrying out a plan: what was finished is found again, damaged pieces are made again, and the bytes are the same."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae import storage
from audiomae.artifacts import receipts
from audiomae.artifacts import releases as release
from audiomae.artifacts.receipts import FileEntry
from audiomae.corpus.manifest import clip_id
from audiomae.errors import IntegrityError, ReleaseConflictError
from audiomae.search import build, build_measure, build_steps, pieces, segments, tuning
from audiomae.search import index as ann
from audiomae.search.audio_index import AudioIndex
from audiomae.search.build_plan import make_plan
from audiomae.search.plan import BuildPlan, Request
from audiomae.search.spec import BuildOptions

DIM, ROWS = 16, 2000
IVF = {"flat_max_rows": 100}
CONFIG = BuildOptions(recall=0, queries=20, filter_queries=0, map=False, **IVF)  # type: ignore[arg-type]
VECTORS = clusters(ROWS, DIM)


@pytest.fixture
def work(tmp_path: Path) -> BuildPlan:
    """The first build of two thousand rows, in two parts."""
    embeddings = make_set(tmp_path / "a", VECTORS)
    found = make_plan([embeddings], None, Request(), CONFIG)
    assert found is not None
    return found


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that say when and by whom."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("CLAIM", "release.json") and path.parent.name != "history"
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """Stands for a process that ends."""


def run(work: BuildPlan, index_dir: Path, last_step: int | None = None) -> list[str]:
    """Carry out the plan, in this process; the names of its steps. Ends before the step of this number."""
    steps: list[str] = []

    def runner(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results = []
        for call in calls:
            if last_step is not None and len(steps) == last_step:
                raise Killed
            steps.append(label)
            results.append(step(*call))
        return results

    def save_encoder(target: Path) -> None:
        storage.write_json(target / "config.json", {"fingerprint": "f" * 64})

    build.run_build(work, str(index_dir), CONFIG, runner, save_encoder, {"fingerprint": "f" * 64, "dim": DIM})
    return steps


def test_a_build_that_ends_anywhere_goes_on_where_it_was_and_gives_the_same_bytes(
    work: BuildPlan, tmp_path: Path
) -> None:
    whole = run(work, tmp_path / "whole")
    assert whole[:2] == ["rows", "rows"] and {"train", "lists", "segments", "recall"} <= set(whole)
    expected = content(tmp_path / "whole")
    assert not any(name.startswith(("parts/", ".staging", ".removing")) for name in expected)
    for step in (1, 3, 4, len(whole) - 3, len(whole) - 1):
        index_dir = tmp_path / str(step)
        with pytest.raises(Killed):
            run(work, index_dir, step)
        pieces = stamps(index_dir)
        assert release.resolve_or_none(index_dir) is None
        with pytest.raises(Killed):
            run(work, index_dir, step)
        assert stamps(index_dir) == pieces  # nothing was made twice
        run(work, index_dir)
        assert content(index_dir) == expected


def test_damaged_pieces_are_made_again(work: BuildPlan, tmp_path: Path) -> None:
    run(work, tmp_path / "whole")
    with pytest.raises(Killed):
        run(work, tmp_path / "index", 6)
    parts = sorted((tmp_path / "index" / "parts").iterdir())
    (parts[0] / "receipt.json").unlink()
    (parts[1] / "ids.npy").write_bytes(b"half")
    run(work, tmp_path / "index")
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_the_number_of_parts_does_not_change_the_segment(tmp_path: Path) -> None:
    embeddings = make_set(tmp_path / "a", VECTORS, shards=5)
    sums = []
    for parts in (1, 2, 7):
        made = make_release(tmp_path / f"index{parts}", [embeddings], min_parts=parts, **IVF)
        assert made is not None
        (segment,) = made.info["segments"]
        sums.append(receipts.read(tmp_path / f"index{parts}" / segment["name"] / "receipt.json").files)
    assert sums[0].keys() == sums[1].keys()
    same = [name for name in sums[0] if sums[0][name] == sums[1][name] == sums[2][name]]
    # the training sample is drawn from the rows in the same order, so all of it is the same
    assert set(sums[0]) == set(same)


def test_the_training_sample_has_no_held_out_id_and_no_row_twice(work: BuildPlan, tmp_path: Path) -> None:
    place = pieces.Place(str(tmp_path / "index"), "000000")
    for part in work.parts:
        build_steps.write_rows(part, place)
    folders = [tmp_path / "index" / place.part(part) for part in work.parts]
    ids = np.concatenate([np.load(folder / segments.IDS_FILE) for folder in folders])
    rows = np.concatenate([ann.RowStore(folder / ann.VECTORS_FILE).rows for folder in folders])
    allowed = rows[~build_steps.held_out(ids)]
    assert 0 < build_steps.held_out(ids).sum() < ROWS / 20
    np.testing.assert_array_equal(build_steps.sample(work.made, place, 10 * ROWS, seed=0), allowed)
    some = build_steps.sample(work.made, place, 300, seed=1)
    assert len(some) == 300 == len(np.unique(some, axis=0))
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in allowed}


def test_a_shard_that_changes_meanwhile_is_refused(work: BuildPlan, tmp_path: Path) -> None:
    path = next((tmp_path / "a" / "commits").iterdir())
    receipt = receipts.read(path)
    files = {name: FileEntry("0" * 64) for name in receipt.files}
    path.write_bytes(receipts.Receipt(files, receipt.facts).encode())
    with pytest.raises(IntegrityError, match="changed while it was indexed"):
        run(work, tmp_path / "index")


def uris(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{number:06d}.wav" for number in range(count)]


def ids(names: Sequence[str]) -> list[int]:
    return [clip_id(name, 0.0, 0.0) for name in names]


def found(index_dir: Path, count: int = 5000) -> set[str]:
    index = AudioIndex.open(index_dir)
    return {item["uri"] for item in index.search(np.ones(DIM), k=min(count, len(index))).items[0]}


def sizes(made: release.Release | None) -> list[int]:
    assert made is not None
    return [segment["rows"] for segment in made.info["segments"]]


def steps_of(index_dir: Path, sets: Sequence[Any], delete: Sequence[int] = ()) -> list[str]:
    """The steps that an update takes; it must leave the recall of exact answers that a look at all rows finds."""
    config = BuildOptions(recall=0.5, queries=200, filter_queries=0, map=False, **IVF)  # type: ignore[arg-type]
    found = make_plan(sets, release.resolve_or_none(index_dir), Request(delete=np.array(sorted(delete))), config)
    assert found is not None
    steps: list[str] = []

    def runner(label: str, step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        steps.extend([label] * len(calls))
        if label == "recall" and len(calls[0][4]) == 1:  # the exact answers, by which it is judged
            task, place, deleted, queries, (answers, *_), _ = calls[0]
            blocks = [(task, place, deleted, queries, block) for block in tuning.blocks(task)]
            whole = tuning.join([build_measure.exact_block(*block) for block in blocks])
            np.testing.assert_allclose(answers, whole.best[0], atol=1e-6)
        return build.run_here(label, step, calls)

    def save_encoder(target: Path) -> None:
        storage.write_json(target / "config.json", {"fingerprint": "f" * 64})

    build.run_build(found, str(index_dir), config, runner, save_encoder, {"fingerprint": "f" * 64, "dim": DIM})
    return steps


def test_an_update_compares_new_rows_alone_with_the_exact_answers_that_the_release_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "BLOCK_ROWS", 256)
    index_dir = tmp_path / "index"
    assert steps_of(index_dir, [make_set(tmp_path / "a", VECTORS)]).count("exact answers") == 8
    more = [
        make_set(tmp_path / name, clusters(40, DIM, seed=n), names=uris(40, name)) for n, name in enumerate("bcd", 1)
    ]
    assert steps_of(index_dir, more[:1]).count("exact answers") == 1
    assert steps_of(index_dir, more[1:2], delete=ids(uris(60))).count("exact answers") == 1  # neighbours among them
    kept = release.resolve(index_dir).path / tuning.NEIGHBOURS_FILE
    near = tuning.Neighbours.from_bytes(kept.read_bytes())
    assert not np.isin(near.ids, ids(uris(60))).any() and np.isin(ids(uris(40, "c")), near.ids).any()
    gone = near.ids[:1, :30].ravel()  # a query loses all but two of the neighbours that are known
    assert steps_of(index_dir, more[2:], delete=gone.tolist()).count("exact answers") == 11


@pytest.mark.parametrize("kind", [{}, IVF], ids=["flat", "ivf"])
def test_a_change_writes_what_changed_and_no_more(tmp_path: Path, kind: dict[str, Any]) -> None:
    index_dir = tmp_path / "index"
    first = make_release(index_dir, [make_set(tmp_path / "a", VECTORS)], **kind)
    before = stamps(index_dir / "segments")
    second = make_release(index_dir, [make_set(tmp_path / "b", clusters(40, DIM, seed=1), names=uris(40, "b"))], **kind)
    assert sizes(first) == [ROWS] and sizes(second) == [ROWS, 40]
    third = make_release(index_dir, [], delete=ids(uris(10)), **kind)
    assert third is not None and third.info["rows_deleted"] == 10 and sizes(third) == [ROWS, 40]
    after = stamps(index_dir / "segments")
    assert {name: after[name] for name in before} == before
    own = {path.name: path.stat().st_size for path in (index_dir / third.version).rglob("*") if path.is_file()}
    queries = len(tuning.Neighbours.from_bytes((third.path / tuning.NEIGHBOURS_FILE).read_bytes()).queries)
    assert own.pop(tuning.NEIGHBOURS_FILE) < 1_000 + queries * (8 + tuning.KEPT * 12)  # however many rows there are
    assert sum(own.values()) < 8000
    assert found(index_dir) == set(uris(ROWS)[10:]) | set(uris(40, "b"))
    assert AudioIndex.open(index_dir).search(clusters(40, DIM, seed=1)[3], k=1).items[0][0]["uri"] == "b000003.wav"


@pytest.mark.parametrize("kind", [{}, IVF], ids=["flat", "ivf"])
def test_segments_of_one_size_are_merged(tmp_path: Path, kind: dict[str, Any]) -> None:
    index_dir = tmp_path / "index"
    make_release(index_dir, [make_set(tmp_path / "a", VECTORS)], **kind)
    history = []
    for number in range(5):
        vectors, names = clusters(40, DIM, seed=number + 1), uris(40, f"set{number}-")
        columns = {"take": [number] * 40} if number % 2 else {"site": [f"s{number}"] * 40}
        made = make_release(
            index_dir, [make_set(tmp_path / f"s{number}", vectors, names=names, columns=columns)], **kind
        )
        history.append(sizes(made))
    assert history == [[ROWS, 40], [ROWS, 40, 40], [ROWS, 40, 40, 40], [ROWS, 160], [ROWS, 160, 40]]
    index = AudioIndex.open(index_dir)
    assert len(index) == ROWS + 200
    hit = index.search(clusters(40, DIM, seed=3)[7], k=1).items[0][0]
    assert hit["uri"] == "set2-000007.wav" and (hit["take"], hit["site"]) == (None, "s2")
    assert {item["uri"][:4] for item in index.search(np.ones(DIM), k=50, filter={"take": 3}).items[0]} == {"set3"}
    assert len({item["site"] for item in index.search(np.ones(DIM), k=9, group_by="site").items[0]}) == 4


def test_a_segment_of_many_deleted_rows_is_written_again(tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    make_release(index_dir, [make_set(tmp_path / "a", VECTORS)], **IVF)
    old = make_release(index_dir, [make_set(tmp_path / "b", VECTORS[:100] * -1, names=uris(100, "b"))], **IVF)
    assert sizes(old) == [ROWS, 100]
    made = make_release(index_dir, [], delete=ids(uris(11, "b")), **IVF)
    assert sizes(made) == [ROWS, 89] and made is not None and made.info["rows_deleted"] == 0
    assert found(index_dir) == set(uris(ROWS)) | set(uris(100, "b")[11:])
    gone = make_release(index_dir, [], delete=ids(uris(100, "b")), **IVF)
    assert sizes(gone) == [ROWS]


def test_deleted_ids_are_found_again_when_asked(tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    embeddings = make_set(tmp_path / "a", VECTORS)
    make_release(index_dir, [embeddings])
    make_release(index_dir, [], delete=ids(uris(20)))
    made = make_release(index_dir, [], undelete=ids(uris(5)))
    assert made is not None and found(index_dir) == set(uris(5)) | set(uris(ROWS)[20:])
    make_release(index_dir, [], delete=ids(uris(600)))  # the segment is written again without them
    assert len(found(index_dir)) == ROWS - 600
    request = Request(undelete=np.array(ids(uris(3)), np.int64))
    plan = make_plan([], release.resolve(index_dir), request, CONFIG.model_copy(update={"flat_max_rows": 20_000}))
    assert plan is not None and "name their --embeddings as well" in plan.notes[0]
    made = make_release(index_dir, [embeddings], undelete=ids(uris(3)))
    assert made is not None and found(index_dir) == set(uris(3)) | set(uris(ROWS)[600:])
    assert made.info["rows"] == ROWS - 597


def test_a_removed_set_is_not_found_and_can_be_added_again(tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    one = make_set(tmp_path / "a", VECTORS[:300])
    two = make_set(tmp_path / "b", VECTORS[300:340], names=uris(40, "b"))
    make_release(index_dir, [one, two])
    make_release(index_dir, [], remove=[str(tmp_path / "b")])
    assert found(index_dir) == set(uris(300))
    make_release(index_dir, [two])
    assert found(index_dir) == set(uris(300)) | set(uris(40, "b"))


def test_old_versions_stay_until_enough_newer_ones_are_there(tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    make_release(index_dir, [make_set(tmp_path / "a", VECTORS[:500])])
    for number in range(4):
        make_release(index_dir, [], delete=ids(uris(number + 1)))
    assert sorted(path.name for path in index_dir.glob("v*")) == ["v000003", "v000004", "v000005"]
    release.rollback(index_dir)
    assert len(found(index_dir)) == 497
    assert len(list((index_dir / "segments").iterdir())) == 1 and not list(index_dir.glob("parts/*"))


def test_of_builds_at_once_one_wins_and_the_others_say_so(tmp_path: Path) -> None:
    index_dir = tmp_path / "index"
    base = make_set(tmp_path / "base", VECTORS[:400])
    make_release(index_dir, [base])
    sets = [make_set(tmp_path / f"s{n}", clusters(60, DIM, seed=n), names=uris(60, f"s{n % 4}-")) for n in range(8)]
    results: list[Any] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        try:
            results.append(make_release(index_dir, [sets[number]]))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [result for result in results if isinstance(result, release.Release)]
    assert len(won) >= 1 and all(isinstance(r, (release.Release, ReleaseConflictError)) for r in results), results
    # builds that started after the first had published extend it: each version in force holds what its parent held
    latest = release.resolve(index_dir)
    release.verify(latest)
    assert len(won) == int(latest.version[1:]) - 1 or len(won) == latest.sequence - 1
    release.gc(index_dir, keep=1)
    left = {path.name for path in index_dir.iterdir()}
    assert left <= {"LATEST", "history", "segments", "parts", latest.version}
    assert len(list((index_dir / "segments").iterdir())) == len(latest.info["segments"])
    assert not list((index_dir / "parts").glob("*"))
