"""A small published release to serve, made without the jobs: an untrained encoder, a dozen sounds, their vectors."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import soundfile

from audiomae.artifacts import releases
from audiomae.corpus.manifest import clip_id
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.model.text import TextConfig
from audiomae.search import index as faiss_index
from audiomae.search.indexed import DELETED_FILE
from audiomae.search.items import ItemsWriter
from audiomae.search.layout import write_map
from audiomae.search.segments import IDS_FILE
from audiomae.search.spec import choose
from serve.access import ADMIN_VARIABLE
from serve.proxy import free_ports

RATE = 16_000
CLASSES = ("chirp", "clicks", "noise", "tone")
CLIPS_PER_CLASS = 3
WINDOW_S = 2.0
PATIENCE_S = 120  # of a busy machine, before a request counts as failed
TOKEN = "a-token-for-tests"
os.environ[ADMIN_VARIABLE] = TOKEN  # before the suite's Ray starts, whose processes inherit it


def sound(label: str, variant: int, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    """float32[S] of one class; variants differ in pitch, rate and noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(variant).normal(0, 1, len(time))
    pitch = 300 * 1.3**variant
    clean = {
        "chirp": np.sin(2 * np.pi * (pitch * time + 400 * time**2)),
        "clicks": ((time * (4 + variant)) % 1 < 0.01).astype(float),
        "noise": noise / 4,
        "tone": np.sin(2 * np.pi * pitch * time) * (0.6 + 0.4 * np.sin(2 * np.pi * 5 * time)),
    }[label]
    return (0.5 * clean + 0.002 * noise).astype(np.float32)


def make_corpus(directory: Path) -> Path:
    """`<class>/<variant>.wav` for every class."""
    for label in CLASSES:
        (directory / label).mkdir(parents=True)
        for variant in range(CLIPS_PER_CLASS):
            soundfile.write(directory / label / f"{variant}.wav", sound(label, variant), RATE)
    return directory


def make_encoder(seed: int = 0, text: TextConfig | None = None) -> AudioEncoder:
    """An untrained encoder of the smallest kind."""
    return AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug"), text=text), seed=seed)


def publish_release(
    index_dir: Path, corpus: Path, encoder: AudioEncoder, staging: Path, shipped: AudioEncoder | None = None
) -> releases.Release:
    """Embed `corpus` with `encoder` and publish it as the next version, with `shipped` as its encoder where given."""
    staging.mkdir()
    files = sorted(corpus.glob("*/*.wav"))
    uris = [str(file.relative_to(corpus)) for file in files]
    rows = faiss_index.to_rows(encoder.embed([str(file) for file in files]))
    spec = choose(len(rows), encoder.dim)
    faiss_index.write_row_store(iter([rows]), encoder.dim, len(rows), staging / faiss_index.VECTORS_FILE)
    ids = np.array([clip_id(uri, 0.0, WINDOW_S) for uri in uris])
    np.save(staging / IDS_FILE, ids)
    np.save(staging / DELETED_FILE, np.empty(0, np.int64))
    table = pa.table(
        {
            "id": ids,
            "uri": uris,
            "start_s": np.zeros(len(uris)),
            "end_s": np.full(len(uris), WINDOW_S),
            "label": [uri.partition("/")[0] for uri in uris],
            "take": [int(Path(uri).stem) for uri in uris],
            "corpus": np.zeros(len(uris), np.int64),
        }
    )
    with ItemsWriter(staging, table.schema) as writer:
        writer.write(table)
    write_map(staging, ids, np.array(uris), rows, np.ones(len(rows), bool))
    (shipped or encoder).save(staging / "encoder")
    info = {
        "spec": spec.model_dump(),
        "fingerprint": encoder.fingerprint,
        "rows": len(rows),
        "dim": encoder.dim,
        "corpora": [{"root": str(corpus), "window_s": WINDOW_S}],
    }
    parent = releases.resolve(index_dir) if (index_dir / "history").exists() else None
    return releases.publish(index_dir, staging, info, parent)


@contextmanager
def running_service(index_dir: Path, **args: object) -> Iterator[httpx.Client]:
    """Serve `index_dir` on a free loopback port of the suite's Ray cluster; a client of it; shut down at the end."""
    from ray import serve as ray_serve

    from serve.app import build

    (port,) = free_ports(1)
    given = {"index": str(index_dir), "port": port, "encoder_threads": 1, "api_replicas": 1}
    given |= {"request_timeout_s": PATIENCE_S, **args}
    ray_serve.run(build(given), name="search")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            until = time.monotonic() + PATIENCE_S
            while not is_ready(client):  # each "no" takes seconds
                assert time.monotonic() < until, client.get("/readyz").text
            yield client
    finally:
        ray_serve.shutdown()


def is_ready(client: httpx.Client) -> bool:
    """Whether the service answers that it is; not while its proxy does not listen yet."""
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        time.sleep(0.2)
        return False


def replicas(deployment: str) -> set[str]:
    """Names of a deployment's live replica actors."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if f"#{deployment}#" in actor["name"]}


def kill(replica: str) -> None:
    """SIGKILL to the process of a replica."""
    import ray

    actor = ray.get_actor(replica, namespace="serve")
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    """Look again and again."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def under_load(
    url: httpx.URL, ask: Callable[[httpx.Client], list[Any]], action: Callable[[], Any], clients: int
) -> list[Any]:
    """Every answer that `clients` got before, during and after `action`; none pauses, each has a thread of its own.

    The action begins when each has an answer and is over before each one's last, so that neither is a race.
    """
    stop, asking = threading.Event(), threading.Barrier(clients + 1)

    def client() -> list[Any]:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
            try:
                seen = ask(http)
                asking.wait(PATIENCE_S)
            except BaseException:
                asking.abort()
                raise
            while not stop.is_set():
                seen += ask(http)
            return seen + ask(http)

    with ThreadPoolExecutor(clients) as pool:
        waiting = [pool.submit(client) for _ in range(clients)]
        try:
            with suppress(threading.BrokenBarrierError):  # a client's own error says more: it is raised below
                asking.wait(PATIENCE_S)
                action()
        finally:
            stop.set()
        return [answer for future in waiting for answer in future.result()]


def as_file(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    """float32[S] or [S, channels] as the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()
