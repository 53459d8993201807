"""The build job on real Ray: first build, relaunch, growth, deletion, S3, a killed driver, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from embedding_sets import clusters, make_set, tiny_encoder

from audiomae import AudioEncoder, AudioIndex, storage
from audiomae.artifacts import releases as release
from audiomae.corpus.manifest import clip_id
from audiomae.errors import ConfigError, IntegrityError, UserError
from ray_jobs.build_index import main

pytestmark = pytest.mark.usefixtures("ray_cluster")
DIM = 32
IVF = ["--set", "flat_max_rows=100", "--set", "map=false"]  # the map is drawn where the scan is built


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> AudioEncoder:
    """A saved encoder; `.home` is where."""
    home = tmp_path_factory.mktemp("encoder")
    made = tiny_encoder(home)
    made.home = str(home)  # type: ignore[assignment]
    return made


def build(out: Path | str, encoder: AudioEncoder, *dirs: Path | str, extra: list[str] | None = None) -> int:
    embeddings = ["--embeddings", *map(str, dirs)] if dirs else []
    return main([*embeddings, "--encoder", str(encoder.home), "--out", str(out), *(extra or [])])


def embedded(
    directory: Path, encoder: AudioEncoder, count: int, seed: int = 0, prefix: str = "", spread: float = 0.5
) -> np.ndarray:
    vectors = clusters(count, DIM, seed=seed, spread=spread)
    names = [f"{prefix}{row}.wav" for row in range(count)]
    labels = {"label": [f"class{row % 5}" for row in range(count)]}
    make_set(directory, vectors, names=names, columns=labels, fingerprint=encoder.fingerprint)
    return vectors


@pytest.mark.parametrize("extra", [[], IVF], ids=["flat", "ivf"])
def test_build_relaunch_grow_delete(
    tmp_path: Path, encoder: AudioEncoder, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    index_dir = tmp_path / "index"
    vectors = embedded(tmp_path / "a", encoder, 2000)
    assert build(index_dir, encoder, tmp_path / "a", extra=extra) == 0
    assert "published" in capsys.readouterr().out
    index = AudioIndex.open(index_dir)
    assert len(index) == 2000 and index.fingerprint == encoder.fingerprint
    assert AudioEncoder.load(index.encoder_dir).fingerprint == encoder.fingerprint
    assert [item["uri"] for (item,) in index.search(vectors[:3], k=1).items] == ["0.wav", "1.wav", "2.wav"]
    info = index.release.info
    assert info["recall"]["value"] >= 0.95 and info["recall"]["queries"] > 10
    assert [segment["rows"] for segment in info["segments"]] == [2000]
    assert not list(index_dir.glob("parts/*")) and not list(index_dir.glob(".staging*"))
    reports = [path.read_text() for path in index_dir.glob("reports/v000001.html")]
    assert len(reports) == bool(extra)  # nothing is tried where every vector is compared
    for page in reports:
        assert page.count('<tr class="main">') == 1 and "all vectors compared" in page
        assert page.count("<tr") == 3 + len(info["recall"]["tried"]) + len(info["recall"]["filtered"])
        assert "data:image/png;base64,iVBOR" in page

    before = sorted(path for path in index_dir.rglob("*"))
    assert build(index_dir, encoder, tmp_path / "a", extra=extra) == 0
    assert "nothing to do: v000001" in capsys.readouterr().out
    assert sorted(path for path in index_dir.rglob("*")) == before

    embedded(tmp_path / "b", encoder, 300, seed=1, prefix="b")
    assert build(index_dir, encoder, tmp_path / "a", tmp_path / "b", extra=extra) == 0
    assert len(AudioIndex.open(index_dir)) == 2300
    grown = list(release.resolve(index_dir).info["segments"])
    assert grown[0] == info["segments"][0] and [segment["rows"] for segment in grown] == [2000, 300]

    doomed = [clip_id(f"{row}.wav", 0.0, 0.0) for row in range(3)]
    (tmp_path / "doomed").write_text("# requested\n" + "\n".join(map(str, doomed)) + "\n\n")
    assert build(index_dir, encoder, extra=[*extra, "--delete-ids", str(tmp_path / "doomed")]) == 0
    index = AudioIndex.open(index_dir)
    assert index.version == "v000003" and len(index) == 2297
    assert not set(doomed) & set(index.search(vectors[0], k=100).ids[0])
    assert len(AudioIndex.open(index_dir, version="v000001")) == 2000


def test_built_on_s3_and_served_from_there(
    tmp_path: Path, encoder: AudioEncoder, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    vectors = embedded(tmp_path / "a", encoder, 500)
    storage.copy_tree(tmp_path / "a", f"{s3_bucket}/a")
    storage.copy_tree(encoder.home, f"{s3_bucket}/encoder")
    args = ["--encoder", f"{s3_bucket}/encoder", "--out", f"{s3_bucket}/index", *IVF]
    assert main(["--embeddings", f"{s3_bucket}/a", *args]) == 0
    embedded(tmp_path / "b", encoder, 60, seed=1, prefix="b")
    assert main(["--embeddings", str(tmp_path / "b"), *args]) == 0
    index = AudioIndex.open(f"{s3_bucket}/index")
    assert index.version == "v000002" and len(index) == 560
    assert index.search(vectors[7], k=1).items[0][0]["uri"] == "7.wav"
    assert AudioEncoder.load(index.encoder_dir).fingerprint == encoder.fingerprint


def test_a_killed_build_is_finished_by_the_same_line(tmp_path: Path, encoder: AudioEncoder) -> None:
    embedded(tmp_path / "a", encoder, 1000)
    index_dir = tmp_path / "index"
    line = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(encoder.home), str(index_dir)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # in the middle of the rows; with everything built; with all files in place but not in force
    for point in ("releases.create_piece", "releases.publish", "releases._enter"):
        done = subprocess.run([*line, point], env=env, timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert release.resolve_or_none(index_dir) is None
    segments = {path: path.stat().st_mtime_ns for path in (index_dir / "segments").rglob("*") if path.is_file()}
    assert segments
    done = subprocess.run([*line, "releases.gc"], env=env, timeout=120)  # in force, not yet cleaned up
    assert done.returncode == -signal.SIGKILL
    assert {path: path.stat().st_mtime_ns for path in segments} == segments
    assert build(index_dir, encoder, tmp_path / "a", extra=["--set", "map=false"]) == 0
    index = AudioIndex.open(index_dir)
    assert len(index) == 1000
    assert {path.name for path in index_dir.iterdir()} <= {"LATEST", "history", "segments", "parts", index.version}
    assert not list(index_dir.glob("parts/*"))


KILLED = """
import os, signal, sys
from audiomae import storage
from audiomae.artifacts import releases
from ray_jobs.build_index import main
from ray_jobs.indexing import job
directory, encoder, out, point = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(releases, point.partition(".")[2], die)
job._save_encoder = lambda given, sets, base, fingerprint, target: storage.write_json(
    target / "config.json", {"fingerprint": fingerprint}
)
job.run_tasks = lambda label, step, calls: [step(*call) for call in calls]
main(["--embeddings", directory, "--encoder", encoder, "--out", out, "--set", "map=false"])
"""


def test_recall_that_is_not_reached_publishes_nothing(tmp_path: Path, encoder: AudioEncoder) -> None:
    embedded(tmp_path / "a", encoder, 1000)
    with pytest.raises(UserError, match=r"recall@10 is [01]\.\d+ on \d+ held-out queries at best.*asks for 1.1"):
        build(tmp_path / "index", encoder, tmp_path / "a", extra=[*IVF, "--recall", "1.1"])
    assert release.resolve_or_none(tmp_path / "index") is None
    assert not (tmp_path / "index" / "LATEST").exists()


def test_more_recall_tunes_the_index_again(tmp_path: Path, encoder: AudioEncoder) -> None:
    embedded(tmp_path / "a", encoder, 1000, spread=3.0)
    build(tmp_path / "index", encoder, tmp_path / "a", extra=[*IVF, "--recall", "0.2"])
    first = release.resolve(tmp_path / "index")
    build(tmp_path / "index", encoder, tmp_path / "a", extra=[*IVF, "--recall", "0.99"])
    second = release.resolve(tmp_path / "index")
    assert second.version == "v000002" and second.info["recall"]["value"] >= 0.99
    assert second.info["spec"]["nprobe"] > first.info["spec"]["nprobe"]
    assert second.info["pieces"] == first.info["pieces"]


def test_encoders_that_do_not_belong_are_refused(tmp_path: Path, encoder: AudioEncoder) -> None:
    embedded(tmp_path / "a", encoder, 100)
    other = tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(IntegrityError, match=f"fingerprint {other.fingerprint}, expected {encoder.fingerprint}"):
        main(["--embeddings", str(tmp_path / "a"), "--encoder", str(tmp_path / "other"), "--out", str(tmp_path / "i")])
    embedded(tmp_path / "b", other, 100, prefix="b")
    with pytest.raises(IntegrityError, match=r"/b: embedded by another encoder.*as in .*/a"):
        build(tmp_path / "index", encoder, tmp_path / "a", tmp_path / "b")
    build(tmp_path / "index", encoder, tmp_path / "a")
    with pytest.raises(IntegrityError, match=r"/b: embedded by another encoder.*in force"):
        build(tmp_path / "index", encoder, tmp_path / "b")
    assert release.resolve(tmp_path / "index").version == "v000001"


def test_a_damaged_shard_fails_the_build_with_its_name(tmp_path: Path, encoder: AudioEncoder) -> None:
    embedded(tmp_path / "a", encoder, 100)
    shard = sorted((tmp_path / "a" / "embeddings").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{shard.name}: damaged: got sha256 \w+, expected \w+"):
        build(tmp_path / "index", encoder, tmp_path / "a")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--embeddings", "{}/nothing"], UserError, "no run.json"),
        (["--embeddings", "{}/a", "--encoder", "{}/nothing"], UserError, "--encoder .*nothing"),
        ([], UserError, "name at least one --embeddings DIR"),
        (["--embeddings", "{}/a", "--delete-ids", "{}/nothing"], UserError, "one clip id a line"),
        (["--embeddings", "{}/a", "--delete-ids", "{}/bad"], UserError, "line 2: expected a clip id, got 'x'"),
        (["--embeddings", "{}/a", "--delete-ids", "{}/huge"], UserError, "line 1: 9223372036854775808 is no clip id"),
        (["--embeddings", "{}/a", "--undelete", "{}/minus"], UserError, "line 1: -1 is no clip id: expected 0 to"),
        (["--embeddings", "{}/a", "--index", "PQ8"], ConfigError, "expected Flat, IVF<lists>"),
        (["--embeddings", "{}/a", "--set", "recal=0.5"], ConfigError, "did you mean 'recall'"),
        (["--embeddings", "{}/a", "--recall", "0", "--set", "rows_per_part=0"], ConfigError, "rows_per_part"),
    ],
)
def test_bad_usage(
    tmp_path: Path, encoder: AudioEncoder, args: list[str], error: type[Exception], message: str
) -> None:
    embedded(tmp_path / "a", encoder, 20)
    (tmp_path / "bad").write_text("12\nx\n")
    (tmp_path / "huge").write_text(f"{2**63}\n")
    (tmp_path / "minus").write_text("-1\n")
    line = [text.format(tmp_path) for text in args]
    with pytest.raises(error, match=message):
        main([*line, "--out", str(tmp_path / "index")])
    assert release.resolve_or_none(tmp_path / "index") is None


def test_help_and_exit_status(tmp_path: Path) -> None:
    job = [sys.executable, "ray_jobs/build_index.py"]
    root = Path(__file__).resolve().parents[2]
    shown = subprocess.run([*job, "--help"], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0 and "--delete-ids" in shown.stdout
    failed = subprocess.run([*job, "--out", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: nothing to index")
    usage = subprocess.run([*job, "--out", "x", "--set", "a.b=1"], cwd=root, capture_output=True, text=True)
    assert usage.returncode == 2 and json.dumps(usage.stderr).count("Traceback") == 0


def test_vectors_of_two_precisions_are_refused_or_recorded(tmp_path: Path, encoder: AudioEncoder) -> None:
    for name, precision in (("a", "float32"), ("b", "bfloat16")):
        vectors, names = clusters(60, DIM, seed=len(name)), [f"{name}{row}.wav" for row in range(60)]
        make_set(tmp_path / name, vectors, names=names, fingerprint=encoder.fingerprint, precision=precision)
    index_dir = tmp_path / "index"
    assert build(index_dir, encoder, tmp_path / "a") == 0
    assert release.resolve(index_dir).info["precision"] == "float32"
    with pytest.raises(UserError, match=r"different precisions \(.*float32.*bfloat16.*\): .*--allow-mixed-precision"):
        build(index_dir, encoder, tmp_path / "a", tmp_path / "b")
    assert build(index_dir, encoder, tmp_path / "a", tmp_path / "b", extra=["--allow-mixed-precision"]) == 0
    assert release.resolve(index_dir).info["precision"] == "bfloat16+float32"
