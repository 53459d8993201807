"""The client: what it sends, what it makes of answers, when it tries again."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from audiomae import client as module
from audiomae.client import AudioClient, ServiceError, table
from audiomae.errors import UserError

HIT = {"id": 2**62, "uri": "a.wav", "start_s": 0.0, "end_s": 2.0, "score": 0.5, "probability": None}
HIT |= {
    "item": {"label": "rain", "x": None},
    "matches": {"windows": 1, "spans": [{"start_s": 0, "end_s": 2, "score": 1}]},
}
ANSWER = {"release": "v1", "results": [HIT], "timing_ms": {"total": 1.0}, "partial": False, "missing": []}


def answering(monkeypatch: pytest.MonkeyPatch, *replies: Any) -> tuple[AudioClient, list[httpx.Request], list[float]]:
    """A client whose service gives these replies, the last one for ever; the requests; the pauses between them."""
    requests: list[httpx.Request] = []
    pauses: list[float] = []
    left = list(replies)

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        reply = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(**reply)

    monkeypatch.setattr(module.time, "sleep", pauses.append)
    client = AudioClient("http://x", token="t")
    client._http = httpx.Client(
        base_url="http://x", headers=client._http.headers, transport=httpx.MockTransport(handle)
    )
    return client, requests, pauses


def problem(status: int, code: str, **headers: str) -> dict[str, Any]:
    return {"status_code": status, "json": {"code": code, "detail": "because"}, "headers": headers}


def test_a_file_is_sent_and_hits_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client, requests, _ = answering(monkeypatch, {"status_code": 200, "json": ANSWER})
    (tmp_path / "q.wav").write_bytes(b"sound")
    result = client.search(tmp_path / "q.wav", k=3, filter={"label": "rain"}, mode="windows")
    assert (result.release, len(result), result[0].id, result[0].spans[0].end_s) == ("v1", 1, 2**62, 2)
    body = requests[0].content
    assert b"sound" in body and b'{"label": "rain"}' in body and b"windows" in body
    assert requests[0].headers["authorization"] == "Bearer t"
    assert table(result).splitlines()[1].split() == ["0.500", "a.wav", "0.0-2.0", "s", "label=rain"]


def test_what_passes_is_tried_again_after_the_time_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [problem(503, "overloaded", **{"Retry-After": "3"}), httpx.ConnectError("no"), {"status_code": 200}]
    client, requests, pauses = answering(monkeypatch, *replies[:2], {"status_code": 200, "json": ANSWER})
    assert client.similar(7)[0].uri == "a.wav"
    assert len(requests) == 3 and 2.4 <= pauses[0] <= 3.6


def test_a_request_that_was_lost_with_its_replica_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = [problem(502, "replica_lost"), {"status_code": 500, "text": "Internal Server Error"}]
    client, requests, _ = answering(monkeypatch, *lost, {"status_code": 200, "json": ANSWER})
    assert client.similar(7)[0].uri == "a.wav" and len(requests) == 3
    client, requests, _ = answering(monkeypatch, problem(500, "internal_error"))
    with pytest.raises(ServiceError, match="500 internal_error"):
        client.similar(7)
    assert len(requests) == 1


def test_what_does_not_pass_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client, requests, _ = answering(monkeypatch, problem(415, "not_audio"))
    with pytest.raises(ServiceError, match=r"because \(415 not_audio\)") as caught:
        client.search(b"nothing")
    assert (caught.value.status, caught.value.code, len(requests)) == (415, "not_audio", 1)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = answering(monkeypatch, problem(503, "overloaded", **{"Retry-After": "3"}))
    client._deadline_s = 1.0
    with pytest.raises(ServiceError, match="503 overloaded"):
        client.release()
    client, _, _ = answering(monkeypatch, httpx.ConnectError("refused"))
    client._deadline_s = 0.1
    with pytest.raises(UserError, match="is the service running"):
        client.release()


def test_the_shell_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client, requests, _ = answering(monkeypatch, {"status_code": 200, "json": ANSWER})
    monkeypatch.setattr(module, "AudioClient", lambda *_: client)
    assert module.main(["similar", "7", "--k", "2", "--filter", json.dumps({"label": "rain"})]) == 0
    assert "a.wav" in capsys.readouterr().out and requests[0].url.path == "/search/id/7"
    with pytest.raises(SystemExit):
        module.main(["search"])
