"""A client of the service: `AudioClient`, and `python -m audiomae.client search file.wav` for the shell.

    with AudioClient("http://127.0.0.1:8000") as client:
        for hit in client.search("rain.wav", k=5, filter={"label": "rain"}):
            print(hit.score, hit.uri)

Refusals that pass by themselves (429, 502, 503, 504), connections that break, and what a proxy says when a replica dies
under a request, are tried again after the time that the service names, within a deadline; every other problem is a
`ServiceError` with the service's stable `code`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import httpx

from audiomae.cli import run_job
from audiomae.errors import AudioMAEError, UserError

DEFAULT_URL = "http://127.0.0.1:8000"
PASSING = (429, 502, 503, 504)
NOT_OURS = "http_error"  # code of an answer that is not the service's own
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class ServiceError(AudioMAEError):
    """The service refused a request; `status` and `code` are its own, the text is its `detail`."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(status, code, detail)
        self.status, self.code, self.detail = status, code, detail

    def __str__(self) -> str:
        return f"{self.detail} ({self.status} {self.code})"


@dataclass(frozen=True)
class Span:
    """A stretch of a hit's file that matches, in seconds, and how near it is."""

    start_s: float
    end_s: float
    score: float
    query_start_s: float | None = None
    query_end_s: float | None = None


@dataclass(frozen=True)
class Hit:
    """One hit. `item` is what the corpus says of it; `spans` are the stretches of its file that match."""

    id: int
    uri: str
    start_s: float
    end_s: float
    score: float
    probability: float | None
    item: Mapping[str, Any]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Result(Sequence[Hit]):
    """Hits of one query, best first; `missing` names shards of the index that did not answer."""

    release: str
    hits: tuple[Hit, ...]
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether hits may lack because a shard did not answer."""
        return bool(self.missing)

    def __getitem__(self, place: Any) -> Any:
        return self.hits[place]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


class AudioClient:
    """Asks a running service.

    Args:
        url: of the service.
        token: one of the service's tokens, where it wants one.
        timeout_s: for one answer.
        deadline_s: for a call with all its tries.
    """

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout_s: float = 60.0, deadline_s: float = 120.0
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)
        self._deadline_s = deadline_s

    def __enter__(self) -> "AudioClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(
        self, sound: str | PathLike[str] | bytes, k: int = 10, filter: Mapping[str, Any] | None = None, **options: Any
    ) -> Result:
        """What sounds like a file.

        Args:
            sound: its path, or its bytes.
            k: hits wanted.
            filter: conditions on the items' columns.
            options: further fields of POST /search: `mode`, `group`, `start_s`, `end_s`, `collapse`, `text`.

        Raises:
            ServiceError: what the service says. UserError: it cannot be reached, or the file cannot be read.
        """
        form = {name: value for name, value in options.items() if value is not None}
        form = {"k": k, **form} | ({"filter": json.dumps(filter)} if filter else {})
        return _result(self._call("POST", "/search", files={"file": ("query", _bytes(sound))}, data=form))

    def search_text(self, text: str, k: int = 10, filter: Mapping[str, Any] | None = None) -> Result:
        """What a description fits. Raises as `search` does."""
        return _result(self._call("POST", "/search/text", json={"text": text, "k": k, "filter": filter}))

    def search_vectors(
        self, vectors: Sequence[Sequence[float]], k: int = 10, filter: Mapping[str, Any] | None = None
    ) -> list[Result]:
        """What is nearest to each of several vectors of this release's encoder. Raises as `search` does."""
        rows = [[float(value) for value in vector] for vector in vectors]
        reply = self._call("POST", "/search/vector", json={"vectors": rows, "k": k, "filter": filter})
        return [_result({**reply, "results": ranking}) for ranking in reply["results"]]

    def similar(self, id: int, k: int = 10, filter: Mapping[str, Any] | None = None) -> Result:
        """More like an item of the index. Raises as `search` does."""
        options = {"k": k} | ({"filter": json.dumps(filter)} if filter else {})
        return _result(self._call("GET", f"/search/id/{id}", params=options))

    def embed(self, sound: str | PathLike[str] | bytes) -> list[float]:
        """The unit vector of a file. Raises as `search` does."""
        vector: list[float] = self._call("POST", "/embed", files={"file": ("query", _bytes(sound))})["vector"]
        return vector

    def release(self) -> dict[str, Any]:
        """What is being served. Raises as `search` does."""
        return self._call("GET", "/release")

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        until, pause_s = time.monotonic() + self._deadline_s, FIRST_PAUSE_S
        while True:
            error: AudioMAEError
            try:
                reply = self._http.request(method, path, **options)
            except httpx.TransportError as broken:
                error = UserError(f"{self._http.base_url}: {broken or type(broken).__name__}; is the service running?")
            else:
                if reply.is_success:
                    content: dict[str, Any] = reply.json()
                    return content
                error = problem = _problem(reply)
                lost = problem.status == 500 and problem.code == NOT_OURS  # with the replica that worked on it
                if problem.status not in PASSING and not lost:
                    raise problem
                pause_s = max(pause_s, _retry_after(reply))
            if time.monotonic() + pause_s > until:
                raise error
            time.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def table(result: Result) -> str:
    """Hits as lines of text: score, file, where in it, and the columns of the corpus."""
    rows = [("score", "file", "at", "about")]
    for hit in result:
        about = ", ".join(f"{name}={value}" for name, value in hit.item.items() if value is not None)
        rows.append((f"{hit.score:.3f}", hit.uri, f"{hit.start_s:.1f}-{hit.end_s:.1f} s", about[:60]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Search with a file, with words or with an item's id, and print the hits as a table."""
    parser = argparse.ArgumentParser(prog="python -m audiomae.client", description=main.__doc__)
    parser.add_argument("action", choices=["search", "text", "similar", "release"])
    parser.add_argument("query", nargs="?", help="an audio file, words, or an id")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the service (default {DEFAULT_URL})")
    parser.add_argument("--token", help="a token of the service, where it wants one")
    parser.add_argument("--k", type=int, default=10, help="hits wanted (default 10)")
    parser.add_argument("--filter", type=json.loads, help='JSON, for example {"label": "rain"}')
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if (args.query is None) != (args.action == "release"):
        parser.error(f"{args.action}: expected {'nothing more' if args.query else 'a file, words or an id'}")
    with AudioClient(args.url, args.token) as client:
        if args.action == "release":
            print(json.dumps(client.release(), indent=2))
            return 0
        if args.action == "search":
            result = client.search(args.query, args.k, args.filter)
        elif args.action == "text":
            result = client.search_text(args.query, args.k, args.filter)
        else:
            result = client.similar(int(args.query), args.k, args.filter)
    print(
        json.dumps([vars(hit) | {"spans": [vars(s) for s in hit.spans]} for hit in result])
        if args.json
        else table(result)
    )
    if result.missing:
        print(f"parts of the index did not answer: {', '.join(result.missing)}", file=sys.stderr)
    return 0


def _result(reply: Mapping[str, Any]) -> Result:
    hits = tuple(
        Hit(
            **{name: hit[name] for name in ("id", "uri", "start_s", "end_s", "score", "probability", "item")},
            spans=tuple(Span(**span) for span in (hit.get("matches") or {"spans": ()})["spans"]),
        )
        for hit in reply["results"]
    )
    return Result(reply["release"], hits, reply["timing_ms"], tuple(reply.get("missing", ())))


def _bytes(sound: str | PathLike[str] | bytes) -> bytes:
    if isinstance(sound, bytes):
        return sound
    try:
        return Path(sound).read_bytes()
    except OSError as error:
        raise UserError(f"{sound}: {error.strerror}") from None


def _problem(reply: httpx.Response) -> ServiceError:
    try:
        body = reply.json()
        return ServiceError(reply.status_code, str(body["code"]), str(body["detail"]))
    except (ValueError, KeyError, TypeError):
        return ServiceError(reply.status_code, NOT_OURS, reply.text[:200])


def _retry_after(reply: httpx.Response) -> float:
    value = reply.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


if __name__ == "__main__":
    run_job(main)
