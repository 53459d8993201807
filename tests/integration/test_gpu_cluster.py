"""Every job on a cluster with GPU nodes (Ray counts the GPUs, torch sees none): what runs where."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import ROOT, another_cluster
from ray.cluster_utils import Cluster
from serving import CLASSES, CLIPS_PER_CLASS, make_corpus, make_encoder, running_service

from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.artifacts.releases import resolve
from audiomae.errors import UserError
from ray_jobs import build_index, embed_corpus, train

pytestmark = pytest.mark.timeout(900)  # of a busy machine: three nodes start
MEMORY = 128 * 1024**2
FILES = len(CLASSES) * CLIPS_PER_CLASS
DEBUG = str(ROOT / "ray_jobs" / "recipes" / "debug.yaml")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with 2 CPUs, a node with a GPU, and one with an L4 and a scratch disk; one CPU beside each GPU."""
    with another_cluster(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": MEMORY},
        )
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=MEMORY)
        kind = {"accelerator_type:L4": 1, "scratch": 2}
        cluster.add_node(num_cpus=1, num_gpus=1, resources=kind, object_store_memory=MEMORY)
        ray.init(cluster.address, log_to_driver=False, logging_level="warning")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder().save(folder)
    return folder


def nodes() -> dict[str, str]:
    """Node id -> `head`, `gpu` or `l4`."""
    kinds = {}
    for node in ray.nodes():
        resources = node["Resources"]
        kinds[node["NodeID"]] = "l4" if "scratch" in resources else "gpu" if "GPU" in resources else "head"
    return kinds


def actors(name: str, since: set[str]) -> Counter[str]:
    """On which kind of node the actors ran whose class is called so and that are not of `since`."""
    found = ray._private.state.actors()
    placed = [
        actor["Address"]["NodeID"]
        for key, actor in found.items()
        if name in actor["ActorClassName"] and key not in since
    ]
    return Counter(nodes()[node] for node in placed if node in nodes())


def tasks(name: str) -> Counter[str]:
    """On which kind of node the tasks ran whose name holds this."""
    from ray.core.generated.gcs_pb2 import TaskEvents

    placed: Counter[str] = Counter()
    for data in ray._private.state.state._connect_and_get_accessor().get_task_events():
        event = TaskEvents.FromString(data)
        if name in event.task_info.name and event.state_updates.node_id:
            placed[nodes().get(event.state_updates.node_id.hex(), "?")] += 1
    return placed


@pytest.fixture
def before(cluster: Cluster) -> set[str]:
    """Actors of earlier tests."""
    return set(ray._private.state.actors())


@pytest.fixture(scope="module")
def embedded(
    cluster: Cluster, corpus: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Counter[str], Counter[str]]:
    """(embeddings, where the encoders were, where decoding was), all settings left at their defaults."""
    out, before = tmp_path_factory.mktemp("emb") / "out", set(ray._private.state.actors())
    flags = ["--encoder", str(encoder), "--corpus", str(corpus), "--shard-minutes", "0.1"]
    assert embed_corpus.main([*flags, "--out", str(out)]) == 0
    return out, actors("EncodeStage", before), tasks("decode_shards")


def test_decoding_is_on_cpu_nodes_and_one_encoder_on_each_gpu(
    embedded: tuple[Path, Counter[str], Counter[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    out, encoders, decoding = embedded
    assert set(encoders) == {"gpu", "l4"}
    assert set(decoding) == {"head"}
    assert EmbeddingSet.open(out).complete and EmbeddingSet.open(out).num_rows == FILES


def test_placement_is_configurable(
    before: set[str], corpus: Path, encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half a GPU of one kind and a custom resource each: both encoders share that node."""
    config = tmp_path / "placement.yaml"
    config.write_text("accelerator_type: L4\nencode_resources: {scratch: 1}\nnum_gpus_per_encoder: 0.5\nworkers: 2\n")
    flags = ["--encoder", str(encoder), "--corpus", str(corpus), "--config", str(config), "--topology", "fused"]
    assert embed_corpus.main([*flags, "--shard-minutes", "0.1", "--out", str(tmp_path / "out")]) == 0
    assert set(actors("FusedStage", before)) == {"l4"}
    assert "torch sees no CUDA device" in capfd.readouterr().err


def test_training_takes_the_gpus(before: set[str], corpus: Path, tmp_path: Path) -> None:
    flags = ["--config", DEBUG, "--set", "epochs=1", "--set", "batch_size=4", "--set", "data.val_fraction=0"]
    assert train.main([*flags, "--corpus", str(corpus), "--storage", str(tmp_path), "--name", "run"]) == 0
    assert actors("RayTrainWorker", before).keys() == {"gpu", "l4"}


def test_index_and_service(
    before: set[str], embedded: tuple[Path, Counter[str], Counter[str]], encoder: Path, corpus: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    flags = ["--embeddings", str(embedded[0]), "--encoder", str(encoder), "--out", str(index)]
    assert build_index.main(flags) == 0
    assert set(tasks("write_rows")) == {"head"}
    assert resolve(index).info["rows"] == FILES
    with running_service(index) as client:
        clip = next(corpus.glob("*/*.wav"))
        answer = client.post("/search", files={"file": clip.read_bytes()}, data={"k": 1})
        assert answer.status_code == 200, answer.text
        assert actors("Encoder", before).keys() <= {"gpu", "l4"} and actors("Encoder", before).total() == 1


def test_a_folder_that_other_nodes_do_not_see_is_refused_at_once(
    cluster: Cluster, corpus: Path, encoder: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    environment = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults'}:{ROOT}", "AUDIOMAE_FAULT_HIDE": str(hidden)}
    node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY, env_vars=environment)
    try:
        cluster.wait_for_nodes()
        flags = ["--encoder", str(encoder), "--corpus", str(corpus)]
        with pytest.raises(UserError, match=r"--out .*hidden/out is on a disk of .* does not see; put it on s3://"):
            embed_corpus.main([*flags, "--out", str(hidden / "out")])
        with pytest.raises(UserError, match=r"--storage .*does not see"):
            train.main(["--config", DEBUG, "--corpus", str(corpus), "--storage", str(hidden), "--name", "run"])
        with pytest.raises(UserError, match=r"--out .*does not see"):
            build_index.main(["--embeddings", str(corpus), "--out", str(hidden / "index")])
        assert list(hidden.iterdir()) == []
    finally:
        cluster.remove_node(node)
