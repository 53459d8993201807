"""Kills at random moments: drivers, encode workers, decode tasks, nodes. Relaunched, nothing is lost or doubled."""

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from embed_cluster import DEADLINE_S, EmbedCluster, a_moment, commits, embed_cluster, embed_here, wait_until

from audiomae.artifacts.embeddings import EmbeddingSet, column_to_vectors
from audiomae.corpus.synthetic import generate
from audiomae.embedding.plan import load_plan
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.storage import read_json

pytestmark = pytest.mark.timeout(2400)  # minutes on a busy machine
FLAGS = ["--window-s", "2", "--shard-minutes", "0.15"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbedCluster]:
    with embed_cluster({"AUDIOMAE_FAULT_DELAY_S": "0.05"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"}))).save(directory)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("corpus"), num_clips=70)


class Job:
    """One `embed_corpus` command line that is launched, hurt and launched again."""

    def __init__(self, cluster: EmbedCluster, encoder: Path, corpus: Path, out: Path, *flags: str) -> None:
        self.cluster, self.out, self.log = cluster, out, out.with_suffix(".log")
        self.flags = ["--encoder", str(encoder), "--corpus", str(corpus), "--out", str(out), *FLAGS, *flags]
        self.process: subprocess.Popen[bytes] | None = None

    def hurt(self, kind: str, rng: random.Random, *flags: str) -> None:
        """Launch it if it does not run, wait until it is at work and for a random moment, and kill one part of it."""
        if self.process is None:
            self.process = self.cluster.launch(*self.flags, *flags, log=self.log)
        if kind == "decode":  # decoding runs ahead of the commits
            self.cluster.kill_worker("decode_shards", rng, self.process)
            return
        before = commits(self.out)
        wait_until(lambda: commits(self.out) > before, f"commit {before + 1}", self.process)
        a_moment(rng)
        if kind == "encode":
            self.cluster.kill_worker("MapWorker", rng, self.process)
        elif kind == "node":
            self.cluster.lose_node()
        else:
            self.process.kill()
            self.process.wait()
            self.process = None

    def finish(self) -> str:
        """Run to the end; what it printed."""
        process = self.process or self.cluster.launch(*self.flags, log=self.log)
        status = process.wait(timeout=DEADLINE_S)
        assert status == 0, self.log.read_text()[-3000:]
        return self.log.read_text()


@pytest.fixture(scope="module")
def undisturbed(encoder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embed_here(encoder, corpus, tmp_path_factory.mktemp("undisturbed"), window_s=2)


def assert_same(out: Path, undisturbed: Path) -> None:
    """The same rows, none lost, none twice, with the same vectors, and nothing else in the folder."""
    sets = [EmbeddingSet.open(path) for path in (out, undisturbed)]
    tables = [embeddings.read().sort_by("id") for embeddings in sets]
    assert len(sets[0].shards) > 20  # enough of them for kills to fall in between
    assert sets[0].complete and len(set(tables[0]["id"].to_pylist())) == tables[0].num_rows
    assert tables[0].drop(["embedding"]).equals(tables[1].drop(["embedding"]))
    vectors = [column_to_vectors(table["embedding"]) for table in tables]
    assert (1 - (vectors[0] * vectors[1]).sum(axis=1)).max() < 1e-5
    failures = [embeddings.failures().select(["uri", "error_class"]).sort_by("uri") for embeddings in sets]
    assert failures[0].equals(failures[1])
    counts = read_json(out / "run.json")
    assert counts["inputs"] == counts["embedded"] + counts["failed"] == read_json(undisturbed / "run.json")["inputs"]
    named = {receipt.embeddings for receipt in sets[0].receipts.values()}
    assert {f"embeddings/{path.name}" for path in (out / "embeddings").iterdir()} == named


def test_a_kill_of_every_kind_leaves_no_trace(
    cluster: EmbedCluster, encoder: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(2026)
    job = Job(cluster, encoder, corpus, tmp_path / "out")
    job.hurt("decode", rng, "--topology", "split")
    job.hurt("encode", rng)
    job.hurt("node", rng)
    job.hurt("driver", rng)
    done = sum(EmbeddingSet.open(job.out).receipts[shard].inputs for shard in EmbeddingSet.open(job.out).shards)
    printed = job.finish()
    plan = load_plan(job.out)
    assert plan is not None and done >= 5
    assert f"of {plan.num_items} files are embedded already and skipped" in printed
    assert read_json(job.out / "run.json")["last_run"]["skipped"] >= done
    assert_same(job.out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fused", "split"])
@pytest.mark.parametrize("seed", range(4))
def test_random_kills_leave_no_trace(
    cluster: EmbedCluster, encoder: Path, corpus: Path, undisturbed: Path, tmp_path: Path, seed: int, topology: str
) -> None:
    """Four kills per run, eight runs: 32 in all."""
    rng = random.Random(seed)
    job = Job(cluster, encoder, corpus, tmp_path / "out", "--topology", topology)
    for _ in range(4):
        job.hurt(rng.choice(["driver", "encode", "node", "decode" if topology == "split" else "encode"]), rng)
    job.finish()
    assert_same(job.out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error_class", "message"),
    [
        ("segfault", "ProcessDied", ".*signal 11.*tried 3 times.*"),
        ("killed", "ProcessDied", ".*signal 9.*tried 3 times.*"),
        ("exits", "ProcessDied", ".*status 7.*tried 3 times.*"),
        ("hangs", "Stalled", "no window within 10 s"),
    ],
)
def test_a_file_that_kills_its_process_is_quarantined(
    cluster: EmbedCluster, encoder: Path, corpus: Path, tmp_path: Path, fault: str, error_class: str, message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    clips = sorted(corpus.glob("*/*.wav"), key=lambda path: path.stat().st_size)
    for number, clip in enumerate(clips[:12]):
        shutil.copy(clip, source / f"good{number}.wav")
    shutil.copy(clips[-1], source / f"{fault}.wav")
    Job(cluster, encoder, source, tmp_path / "out", "--stall-timeout-s", "10").finish()
    embeddings = EmbeddingSet.open(tmp_path / "out")
    assert set(embeddings.read()["uri"].to_pylist()) == {f"good{number}.wav" for number in range(12)}
    (failure,) = embeddings.failures().to_pylist()
    assert (failure["uri"], failure["stage"], failure["error_class"]) == (f"{fault}.wav", "decode", error_class)
    assert re.fullmatch(message, failure["message"], re.DOTALL), failure["message"]
