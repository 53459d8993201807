"""What a build has to do: shards known by checksum, rows replaced, vanished, deleted, clashing; when to start over."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae import storage
from audiomae.artifacts import releases as release
from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.corpus.manifest import clip_id
from audiomae.errors import UserError
from audiomae.search import index as ann
from audiomae.search.audio_index import AudioIndex
from audiomae.search.build_plan import make_plan
from audiomae.search.items import ItemsWriter
from audiomae.search.plan import BuildPlan, Request
from audiomae.search.spec import BuildOptions

DIM = 16
NONE = np.zeros(0, dtype=np.int64)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}.wav" for number in range(count)]


def ids(uris: list[str]) -> np.ndarray:
    return np.array([clip_id(uri, 0.0, 0.0) for uri in uris])


def plan(index_dir: Path, sets: list[EmbeddingSet], delete: np.ndarray = NONE, **settings: object) -> BuildPlan | None:
    options = BuildOptions(**{"recall": 0} | settings)  # type: ignore[arg-type]
    return make_plan(sets, release.resolve_or_none(index_dir), Request(delete), options)


def indexed(index: Path) -> set[str]:
    """The uris that can be found."""
    opened = AudioIndex.open(index)
    hits = opened.search(np.ones(DIM), k=len(opened))
    return {item["uri"] for item in hits.items[0]}


def test_parts_are_about_equal_and_cover_every_row_once(tmp_path: Path) -> None:
    embeddings = make_set(tmp_path / "a", clusters(100, DIM), shards=3)
    for count, limit in ((2, 1000), (7, 1000), (2, 9)):
        work = plan(tmp_path / "index", [embeddings], min_parts=count, rows_per_part=limit)
        assert work is not None and work.num_new == 100
        sizes = [part.num_rows for part in work.parts]
        assert len(sizes) == max(count, -(-100 // limit)) and max(sizes) - min(sizes) <= 1
        spans = [(s.shard, row) for part in work.parts for s in part.slices for row in range(s.start, s.stop)]
        assert len(set(spans)) == 100
        assert len({part.key for part in work.parts}) == len(sizes)


def test_a_known_shard_is_not_indexed_again_wherever_it_lies(tmp_path: Path) -> None:
    first = make_set(tmp_path / "a", clusters(50, DIM))
    make_release(tmp_path / "index", [first])
    assert plan(tmp_path / "index", [first]) is None
    (tmp_path / "a").rename(tmp_path / "moved")
    assert plan(tmp_path / "index", [EmbeddingSet.open(tmp_path / "moved")]) is None
    second = make_set(tmp_path / "b", clusters(20, DIM, seed=1), names=names("b", 20))
    work = plan(tmp_path / "index", [EmbeddingSet.open(tmp_path / "moved"), second])
    assert work is not None and work.base is not None and work.num_new == 20 and len(work.kept) == 1
    assert len(work.corpora) == 2


def test_a_set_given_twice_counts_once(tmp_path: Path) -> None:
    embeddings = make_set(tmp_path / "a", clusters(50, DIM))
    work = plan(tmp_path / "index", [embeddings, embeddings])
    assert work is not None and work.num_new == 50 and len(work.corpora) == 1


def test_the_later_of_two_sets_of_one_corpus_wins(tmp_path: Path) -> None:
    old = make_set(tmp_path / "old", clusters(30, DIM), names=names("x", 30), columns={"take": [1] * 30})
    new = make_set(tmp_path / "new", clusters(10, DIM, seed=1), names=names("x", 10), columns={"take": [2] * 10})
    make_release(tmp_path / "index", [old, new])
    index = AudioIndex.open(tmp_path / "index")
    assert len(index) == 30
    assert [index.item(int(i))["take"] for i in ids(names("x", 12))] == [2] * 10 + [1] * 2


def test_an_updated_set_replaces_adds_and_forgets(tmp_path: Path) -> None:
    vectors = clusters(200, DIM)
    make_release(tmp_path / "index", [make_set(tmp_path / "a", vectors, shards=10)], compact_share=0.5)
    # an update: shard 0 was rewritten without two files, a new shard has three more
    uris = [f"{i:06d}.wav" for i in range(20)]
    kept = [uri for uri in uris if uri not in ("000003.wav", "000007.wav")] + names("new", 3)
    kept_shards = [f"000000-{number:06d}" for number in range(1, 10)]
    both = make_set(tmp_path / "a", clusters(21, DIM, seed=2), names=kept, shards=2, generation=1, kept=kept_shards)
    make_release(tmp_path / "index", [both], compact_share=0.5)
    found = indexed(tmp_path / "index")
    assert len(found) == 201 and {"new0.wav", "000002.wav", "000199.wav"} <= found
    assert not {"000003.wav", "000007.wav"} & found
    np.testing.assert_allclose(
        AudioIndex.open(tmp_path / "index").vector(int(ids(["000002.wav"])[0])), clusters(21, DIM, seed=2)[2], atol=1e-3
    )
    assert plan(tmp_path / "index", [both], compact_share=0.5) is None


def test_one_id_in_two_corpora_is_refused(tmp_path: Path) -> None:
    one = make_set(tmp_path / "a", clusters(10, DIM), root="/monday")
    other = make_set(tmp_path / "b", clusters(10, DIM, seed=1), root="/tuesday")
    with pytest.raises(UserError, match=r"10 ids are in two corpora .*/monday.*/tuesday.*common parent folder"):
        plan(tmp_path / "index", [one, other])


def test_deleted_ids_stay_deleted_when_embedded_again(tmp_path: Path) -> None:
    first = make_set(tmp_path / "a", clusters(100, DIM), names=names("x", 100))
    make_release(tmp_path / "index", [first])
    victims = ids(names("x", 3))
    make_release(tmp_path / "index", [first], delete=victims.tolist())
    assert indexed(tmp_path / "index") == set(names("x", 100)) - set(names("x", 3))
    assert plan(tmp_path / "index", [first], delete=victims) is None
    again = make_set(tmp_path / "b", clusters(10, DIM, seed=1), names=names("x", 10))
    make_release(tmp_path / "index", [again], compact_share=0.01)
    assert indexed(tmp_path / "index") == set(names("x", 100)) - set(names("x", 3))


def test_many_deletions_write_a_segment_again(tmp_path: Path) -> None:
    first = make_set(tmp_path / "a", clusters(100, DIM), names=names("x", 100))
    make_release(tmp_path / "index", [first])
    work = plan(tmp_path / "index", [], ids(names("x", 9)))
    assert work is not None and len(work.kept) == 1 and not work.made and len(work.deleted) == 9
    work = plan(tmp_path / "index", [], ids(names("x", 11)))
    assert work is not None and not work.kept and [made.num_rows for made in work.made] == [89]
    assert not len(work.deleted)


def test_ids_that_are_not_there_are_named(tmp_path: Path) -> None:
    first = make_set(tmp_path / "a", clusters(100, DIM), names=names("x", 100))
    make_release(tmp_path / "index", [first])
    wanted = np.sort(np.concatenate([ids(names("x", 2)), np.arange(1, 8)]))
    work = plan(tmp_path / "index", [], wanted)
    assert work is not None
    assert work.notes == (
        "7 ids (1, 2, 3, 4, 5, ...) to delete not in the index (they stay deleted if embedded later)",
    )
    assert set(wanted) == set(work.blocked) and len(work.deleted) == 2
    work = make_plan(
        [], release.resolve(tmp_path / "index"), Request(ids(names("x", 1)), undelete=np.array([77])), BuildOptions()
    )
    assert work is not None and work.notes[0].startswith("1 id (77) to undelete: never deleted by request")


def test_a_set_to_remove_must_be_indexed(tmp_path: Path) -> None:
    make_release(tmp_path / "index", [make_set(tmp_path / "a", clusters(10, DIM))])
    with pytest.raises(UserError, match=r"--remove .*/nowhere: not among the indexed embedding sets \(.*/a\)"):
        make_plan([], release.resolve(tmp_path / "index"), Request(remove=(str(tmp_path / "nowhere"),)), BuildOptions())


def test_growth_and_another_choice_rebuild(tmp_path: Path) -> None:
    make_release(tmp_path / "index", [make_set(tmp_path / "a", clusters(1000, DIM))], flat_max_rows=1500)
    more = make_set(tmp_path / "b", clusters(1000, DIM, seed=1), names=names("b", 1000))
    work = plan(tmp_path / "index", [more], flat_max_rows=1500)
    assert work is not None and work.trains and [made.num_rows for made in work.made] == [2000]
    assert work.reason == "rebuilds v000001: IVF32,RaBitQfs suits this size and memory, not an exhaustive scan"
    made = make_release(tmp_path / "index", [more], flat_max_rows=1500)
    assert made is not None and made.info["spec"]["factory"] == "IVF32,RaBitQfs"
    work = plan(tmp_path / "index", [more], flat_max_rows=1500, index="IVF32,SQ8")
    assert work is not None and work.spec.factory == "IVF32,SQ8" and "was asked for" in work.reason
    with pytest.raises(UserError, match="need at least"):
        plan(tmp_path / "index", [more], flat_max_rows=1500, memory_gib=1e-6)


def test_a_release_of_an_older_form_opens_and_is_rebuilt(tmp_path: Path) -> None:
    vectors = clusters(300, DIM)
    staging = tmp_path / "staging"
    staging.mkdir()
    rows = ann.to_rows(vectors)
    uris = names("x", 300)
    ann.write_row_store(iter([rows]), DIM, len(rows), staging / ann.VECTORS_FILE)
    np.save(staging / "ids.npy", ids(uris))
    np.save(staging / "deleted.npy", np.array([3]))
    np.save(staging / "blocked_ids.npy", ids(uris)[3:4])
    index = faiss.index_factory(DIM, "IVF8,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(rows.astype(np.float32))
    index.add(rows.astype(np.float32))
    faiss.write_index(index, str(staging / ann.INDEX_FILE))
    table = pa.table({"id": ids(uris), "uri": uris, "take": list(range(300)), "corpus": np.zeros(300, np.int32)})
    with ItemsWriter(staging, table.schema) as writer:
        writer.write(table)
    storage.write_json(staging / "encoder" / "config.json", {"fingerprint": "f" * 64})
    spec = {"kind": "ivf", "factory": "IVF8,SQ8", "nlist": 8, "nprobe": 8, "refine": 2, "bytes_in_memory": 24}
    corpora = [{"root": "/corpus", "embeddings": "/gone", "shards": []}]
    info = {"spec": spec, "fingerprint": "f" * 64, "rows": 299, "dim": DIM, "corpora": corpora, "recall": {"value": 1}}
    release.publish(tmp_path / "index", staging, info)
    opened = AudioIndex.open(tmp_path / "index")
    assert [items[0]["take"] for items in opened.search(vectors[:5], k=1).items][:3] == [0, 1, 2]
    found = opened.search(vectors[50], k=5, filter={"take": {"gte": 40, "lt": 60}})
    assert found.items[0][0]["take"] == 50 and all(40 <= item["take"] < 60 for item in found.items[0])
    with pytest.raises(KeyError):
        opened.item(int(ids(uris)[3]))
    more = make_set(tmp_path / "b", clusters(50, DIM, seed=1), names=names("b", 50))
    work = plan(tmp_path / "index", [more])
    assert work is not None and work.reason == "rebuilds v000001: it is stored in the form of an older version"
    make_release(tmp_path / "index", [more])
    assert indexed(tmp_path / "index") == (set(uris) - {"x3.wav"}) | set(names("b", 50))


def test_columns_of_all_sets_are_joined(tmp_path: Path) -> None:
    one = make_set(tmp_path / "a", clusters(5, DIM), columns={"label": list("abcde"), "corpus": [9] * 5})
    two = make_set(tmp_path / "b", clusters(5, DIM, seed=1), names=names("b", 5), columns={"take": [1.5] * 5})
    make_release(tmp_path / "index", [one, two])
    index = AudioIndex.open(tmp_path / "index")
    item = index.item(int(ids(["b1.wav"])[0]))
    assert (item["label"], item["take"], item["corpus"], item["manifest_corpus"]) == (None, 1.5, 1, None)
    clash = make_set(tmp_path / "c", clusters(5, DIM, seed=2), names=names("c", 5), columns={"take": ["x"] * 5})
    with pytest.raises(UserError, match="disagree about a manifest column"):
        make_release(tmp_path / "index", [clash])


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name at least one --embeddings"):
        plan(tmp_path / "index", [])
    empty = make_set(tmp_path / "a", np.zeros((0, DIM), np.float32), names=[], shards=1)
    with pytest.raises(UserError, match="hold no rows"):
        plan(tmp_path / "index", [empty])
