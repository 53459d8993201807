"""`verify` and `show`: 200 damaged files of every kind of artifact, each named; and the readers refuse the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from embedding_sets import clusters, make_release, make_set, tiny_encoder

from audiomae import storage
from audiomae.artifacts import catalogue, features, receipts, runs
from audiomae.artifacts import releases as release
from audiomae.artifacts.__main__ import main
from audiomae.artifacts.embeddings import EmbeddingSet, ShardOrigin, ShardTables, commit_shard, read_receipt, write_run
from audiomae.artifacts.features import Segment
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.artifacts.tables import FAILURE_SCHEMA, SILENT_SCHEMA
from audiomae.errors import AudioMAEError, IntegrityError
from audiomae.model.encoder import AudioEncoder

DAMAGES = 200


def make_everything(folder: Path) -> None:
    """One small artifact of every kind: features, embeddings, an index with its parts, an encoder, a training run."""

    def extract(uri: str) -> list[Segment]:
        return [Segment(0.0, 1.0, np.ones((4, 8), np.float32))]

    for index in range(2):
        features.write_shard(str(folder / "features" / "abc"), index, [f"{index}.wav"], extract)
    found = make_set(folder / "emb", clusters(60, 8), columns={"label": ["rain"] * 60}, shards=2)
    failures = [{"uri": "bad.wav", "error_class": "EmptyFile", "kind": "failed"}]
    silent = [{"uri": "quiet.wav", "start_s": 0.0, "end_s": 1.0, "reason": "digital silence", "peak_db": -90.0}]
    (folder / "emb" / "commits" / f"{found.shards[0]}.json").unlink()
    tables = ShardTables(
        next(found.iter_tables()),
        pa.Table.from_pylist(failures, FAILURE_SCHEMA),
        pa.Table.from_pylist(silent, SILENT_SCHEMA),
    )
    (folder / found.path / found.receipts[found.shards[0]].embeddings).unlink()
    commit_shard(
        folder / "emb",
        found.shards[0],
        tables,
        ShardOrigin(inputs=31, audio_s=1.0, fingerprint=found.fingerprint, manifest="m"),
    )
    write_run(folder / "emb", dict(found.run) | {"status": "complete"})
    assert make_release(folder / "index", [EmbeddingSet.open(folder / "emb")]) is not None
    encoder = tiny_encoder(folder / "run" / "encoder")
    (folder / "run" / "config.yaml").write_text("epochs: 1\n")
    runs.finish(folder / "run", {"epoch": 1, "fingerprint": encoder.fingerprint})
    checkpoint = folder / "run" / "checkpoint_00000010"
    encoder.save(checkpoint / "encoder", with_decoder=False)
    torch.save({"step": 10}, checkpoint / "state.pt")
    receipts.create(
        checkpoint / receipts.RECEIPT_FILE,
        receipts.describe(checkpoint, storage.list_sizes(checkpoint), {"step": 10}),
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    make_everything(folder)
    return folder


@pytest.fixture
def work(everything: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(everything, tmp_path / "work"))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes cut somewhere, or with one byte changed."""
    position = int(rng.integers(0, len(data)))
    if rng.random() < 0.3:
        return data[:position]
    return data[:position] + bytes([data[position] ^ int(rng.integers(1, 256))]) + data[position + 1 :]


def test_whole_artifacts_are_said_to_be_whole(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(work)]) == 0
    assert "receipts say" in capsys.readouterr().out
    for name in ("features/abc", "emb", "emb/embeddings", "emb/failures", "index", "run/encoder", "run"):
        assert main(["verify", str(work / name)]) == 0, name
    assert main(["verify", str(work / "emb" / read_receipt(work / "emb", "000000-000000").embeddings)]) == 0


def test_every_one_of_200_damages_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in storage.list_sizes(work) if not name.endswith(("LATEST", "CLAIM"))]
    kinds = ("features/", "/embeddings/", "/failures/", "/silent/", "/commits/", "release.json", "encoder/", "state.pt")
    assert all(any(kind in name for name in names) for kind in kinds)
    assert catalogue.verify(work).unnamed == len(storage.list_sizes(work)) - len(names)
    rng = np.random.default_rng(0)
    for turn in range(DAMAGES):
        name = names[turn % len(names)] if turn < len(names) else names[int(rng.integers(len(names)))]
        whole = (work / name).read_bytes()
        (work / name).write_bytes(damaged(whole, rng))
        problems = catalogue.verify(work / name.partition("/")[0]).problems
        assert str(work / name) in problems, (turn, name)
        assert name.rpartition("/")[2] in problems[str(work / name)]
        (work / name).write_bytes(whole)
    path = next((work / "emb" / "embeddings").iterdir())
    path.unlink()
    assert main(["verify", str(work)]) == 1
    assert f"{path}: missing, but its receipt names it" in capsys.readouterr().err


def read_features(cache: Path) -> list[np.ndarray]:
    shards = ShardCache(str(cache))
    return [shards.get(index) for index in range(2)]


READERS: dict[str, Callable[[Path], object]] = {
    "features/abc/shard-*.npy": lambda work: read_features(work / "features" / "abc"),
    "features/abc/shard-*.parquet": lambda work: features.read_clips(str(work / "features" / "abc"), 2),
    "features/abc/shard-*.json": lambda work: features.read_clips(str(work / "features" / "abc"), 2),
    "emb/embeddings/*": lambda work: EmbeddingSet.open(work / "emb").read(),
    "emb/failures/*": lambda work: EmbeddingSet.open(work / "emb").failures(),
    "emb/silent/*": lambda work: EmbeddingSet.open(work / "emb").silent(),
    "emb/commits/*": lambda work: EmbeddingSet.open(work / "emb"),
    "emb/manifest/plan-*": lambda work: EmbeddingSet.open(work / "emb"),
    "emb/run.json": lambda work: EmbeddingSet.open(work / "emb"),
    "index/history/*": lambda work: release.resolve(work / "index"),
    "index/v*/*.*": lambda work: release.verify(release.resolve(work / "index")),
    "run/encoder/*": lambda work: AudioEncoder.load(str(work / "run" / "encoder"), device="cpu"),
    "run/train.json": lambda work: runs.read_finished(work / "run"),
    "run/config.yaml": lambda work: runs.read_finished(work / "run"),
}


@pytest.mark.parametrize("pattern", READERS)
def test_the_readers_of_the_jobs_refuse_the_same(work: Path, pattern: str) -> None:
    read, rng = READERS[pattern], np.random.default_rng(1)
    paths = sorted(path for path in work.glob(pattern) if path.is_file())
    assert paths
    read(work)
    for path in paths:
        whole = path.read_bytes()
        for _ in range(3):
            path.write_bytes(damaged(whole, rng))
            with pytest.raises(AudioMAEError, match=path.name):
                read(work)
        path.write_bytes(whole)


def test_show_says_what_is_there(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(work)]) == 0
    text = capsys.readouterr().out
    assert f"{work}/emb: 2 embedding shards, 4 files" in text
    assert "  rows: 60\n" in text and "  failed: 1\n" in text and "  silent: 1\n" in text
    for kind in ("index release", "training run", "2 feature shards", "index history"):
        assert kind in text


def test_on_s3_and_where_there_is_nothing(work: Path, s3_bucket: str, tmp_path: Path) -> None:
    storage.copy_tree(work / "emb", f"{s3_bucket}/emb")
    report = catalogue.verify(f"{s3_bucket}/emb")
    assert report.files == 4 and not report.problems
    name = read_receipt(f"{s3_bucket}/emb", "000000-000001").embeddings
    storage.write_bytes(f"{s3_bucket}/emb/{name}", b"PAR1")
    assert list(catalogue.verify(s3_bucket).problems) == [f"{s3_bucket}/emb/{name}"]
    (tmp_path / "empty" / "deep" / "er").mkdir(parents=True)
    with pytest.raises(AudioMAEError, match="no receipt here or above"):
        catalogue.verify(tmp_path / "empty" / "deep" / "er")


def test_command_line_of_an_index(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = str(work / "index")
    found = EmbeddingSet.open(work / "emb")
    assert make_release(work / "index", [found], delete=[int(found.read(["id"])["id"][0].as_py())]) is not None
    assert main(["rollback", index]) == 0 and main(["list", index]) == 0
    assert main(["gc", index, "--keep", "1"]) == 0 and main(["verify", index]) == 0
    text = capsys.readouterr().out
    assert "in force: v000001" in text and "removed: v000002" in text
    assert [line.split()[1] for line in text.splitlines() if " by " in line] == ["publish", "publish", "rollback"]
    with pytest.raises(IntegrityError, match="not a receipt"):
        receipts.Receipt.decode({}, "x")
