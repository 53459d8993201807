"""A release over several shards, as a client sees it: real HTTP, real Ray Serve, processes that are killed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from serving import (
    TOKEN,
    as_file,
    kill,
    make_corpus,
    make_encoder,
    publish_release,
    replicas,
    running_service,
    sound,
    under_load,
    until,
)

from audiomae.client import AudioClient
from audiomae.search.audio_index import AudioIndex
from audiomae.search.sharded import divide_release

SHARDS = 3
CLIP = as_file(np.concatenate([sound("noise", 2), sound("tone", 1)]))


@dataclass(frozen=True)
class Service:
    """A running service and what it serves."""

    http: httpx.Client
    index: Path
    corpus: Path
    work: Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    publish_release(folder / "index", make_corpus(folder / "corpus"), make_encoder(seed=0), folder / "first")
    return folder


@pytest.fixture(scope="module")
def service(ray_cluster: None, work: Path) -> Iterator[Service]:
    with running_service(work / "index", index_shards=SHARDS, recall_shadow=1.0) as http:
        yield Service(http, work / "index", work / "corpus", work)


def ask_everything(http: httpx.Client, index: AudioIndex) -> dict[str, Any]:
    """Every kind of search, without what differs from one time to the next."""
    one, two = (index.table.rows([row])[0]["id"] for row in (0, 7))
    vectors = np.random.default_rng(0).normal(size=(3, index.dim)).tolist()
    filter = {"label": {"in": ["tone", "chirp"]}, "take": {"lt": 2}}
    form = {"files": {"file": ("query", CLIP)}}
    examples = {"include": [{"id": one}], "exclude": [{"id": two}]}
    asked: dict[str, Callable[[], httpx.Response]] = {
        "clip": lambda: http.post("/search", data={"k": 5}, **form),
        "windows": lambda: http.post("/search", data={"k": 5, "mode": "windows"}, **form),
        "every window": lambda: http.post("/search", data={"k": 12, "group": "none"}, **form),
        "filter": lambda: http.post("/search", data={"k": 9, "filter": json.dumps(filter)}, **form),
        "collapse": lambda: http.post("/search", data={"k": 9, "collapse": "true"}, **form),
        "vectors": lambda: http.post("/search/vector", json={"vectors": vectors, "k": 12}),
        "id": lambda: http.get(f"/search/id/{one}", params={"k": 20}),
        "stretch": lambda: http.get(f"/search/id/{one}", params={"k": 20, "start_s": 0.5, "end_s": 1.5}),
        "examples": lambda: http.post("/search/examples", json={"examples": examples, "k": 10}),
        "facets": lambda: http.get("/facets", params={"filter": json.dumps(filter)}),
        "items": lambda: http.get("/items"),
        "item": lambda: http.get(f"/items/{two}"),
    }
    answers = {}
    for name, ask in asked.items():
        reply = ask()
        assert reply.status_code == 200, (name, reply.text)
        answers[name] = without_chances({key: value for key, value in reply.json().items() if key != "timing_ms"})
    return answers


def without_chances(value: Any) -> Any:
    """Without probabilities, which come a moment later where shards are asked for them."""
    if isinstance(value, dict):
        return {key: without_chances(inner) for key, inner in value.items() if key != "probability"}
    return [without_chances(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(ray_cluster: None, work: Path) -> dict[str, Any]:
    """What the release answers undivided; it is named from a folder that is not that of the cluster's processes."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(work)
        with running_service(Path("index"), index_shards=1) as http:
            assert http.get("/release").json()["shards"] == 1
            return ask_everything(http, AudioIndex.open(work / "index"))


def test_nothing_is_missing_of_an_undivided_release(whole: dict[str, Any]) -> None:
    assert all(answer.get("partial", False) is False for answer in whole.values())


def test_shards_answer_as_one_index_does(whole: dict[str, Any], service: Service) -> None:
    assert ask_everything(service.http, AudioIndex.open(service.index)) == whole
    release = service.http.get("/release").json()
    assert (release["shards"], release["missing"]) == (SHARDS, [])
    assert 'state="answering"} 3.0' in service.http.get("/metrics").text


def ask(http: httpx.Client) -> list[dict[str, Any]]:
    """The answers to a sound and to the id of an item."""
    clip = http.get("/items").json()["items"][0]["id"]
    replies = (
        http.post("/search", files={"file": ("query", CLIP)}, data={"k": 12}),
        http.get(f"/search/id/{clip}", params={"k": 12}),
    )
    return [{"status": reply.status_code, **reply.json()} for reply in replies]


def test_a_killed_shard_is_missing_until_it_is_replaced(service: Service) -> None:
    whole = service.http.post("/search/vector", json={"vectors": [[1.0] * 64], "k": 12, "group": "none"}).json()
    assert (whole["partial"], len(whole["results"][0])) == (False, 12)

    def missing() -> list[str]:
        found: list[str] = service.http.get("/release").json()["missing"]
        return found

    def lose() -> None:
        (before,) = replicas("Shard1")
        kill(before)
        until(lambda: missing() == ["Shard1"])
        with AudioClient(str(service.http.base_url)) as client:
            (part,) = client.search_vectors([[1.0] * 64], k=12)
        assert (part.partial, part.missing) in ((True, ("Shard1",)), (False, ()))
        until(lambda: not missing())
        assert before not in replicas("Shard1")

    answers = under_load(service.http.base_url, ask, lose, clients=2)
    assert {answer["status"] for answer in answers} == {200}
    partial = [answer for answer in answers if answer["partial"]]
    assert partial and {tuple(answer["missing"]) for answer in partial} == {("Shard1",)}
    release = AudioIndex.open(service.index).release
    assert [len(parts) for parts in divide_release(release, SHARDS)] == [1, 1, 1]
    again = service.http.post("/search/vector", json={"vectors": [[1.0] * 64], "k": 12, "group": "none"}).json()
    assert (again["results"], again["partial"]) == (whole["results"], False)


def test_a_release_is_swapped_in_all_shards_under_load(service: Service) -> None:
    before = service.http.get("/release").json()["version"]
    second = publish_release(service.index, service.corpus, make_encoder(seed=1), service.work / "second")

    def swap() -> None:
        for version in ("latest", before, second.version):
            headers = {"Authorization": f"Bearer {TOKEN}"}
            reply = service.http.post("/admin/reload", json={"version": version}, headers=headers)
            assert reply.status_code == 200, reply.text
            found = service.http.post("/search", files={"file": ("query", CLIP)}, data={"k": 12}).json()
            assert (found["release"], found["partial"]) == (reply.json()["version"], False)

    answers = under_load(service.http.base_url, ask, swap, clients=2)
    assert {(answer["status"], answer["partial"]) for answer in answers} == {(200, False)}
    assert {answer["release"] for answer in answers} == {before, second.version}


def test_nobody_asks_a_shard_without_the_secret(service: Service) -> None:
    import pyarrow.flight as flight

    @ray.remote(num_cpus=0)
    def address() -> str:
        from ray import serve

        handle = serve.get_deployment_handle("Shard0", "search")
        found: str = handle.address.remote().result()
        return found

    client = flight.FlightClient(ray.get(address.remote()))
    with pytest.raises(flight.FlightUnauthenticatedError, match="its own service only"):
        list(client.do_action(flight.Action("ping", b"")))
