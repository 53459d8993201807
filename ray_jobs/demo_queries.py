"""Ask a running service what it finds for audio files that it has not seen, and count how often it is right.

Every labelled file of a corpus is sent as a real HTTP upload; an answer is right when its best hit has the same label.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiomae.cli import Command, run_command, run_job
from audiomae.errors import UserError
from audiomae.retries import retry
from ray_jobs.configs import QueryConfig

if TYPE_CHECKING:
    import httpx

COMMAND = Command(
    script="ray_jobs/demo_queries.py",
    config=QueryConfig,
    about=__doc__ or "",
    example="python ray_jobs/demo_queries.py --url http://127.0.0.1:8000 --queries held_out/",
)

ATTEMPTS = 6
HITS_SHOWN = 3


@dataclass(frozen=True)
class Query:
    """One upload: the corpus it is from, where in it, and the class it should find."""

    root: str
    uri: str
    label: str


@dataclass(frozen=True)
class DemoAnswer:
    """What came back: labels and scores best first, and the milliseconds from request to answer."""

    query: Query
    labels: list[str]
    scores: list[float]
    milliseconds: float

    @property
    def right(self) -> bool:
        """Whether the best hit is of the query's class."""
        return bool(self.labels) and self.labels[0] == self.query.label


def send(config: QueryConfig) -> list[DemoAnswer]:
    """Send the queries, print the table, write the counts where they are wanted."""
    queries = labelled_queries(config.queries, config.label)
    answers = ask_all(config.url, queries[: config.limit], config.k, config.label)
    print(table(answers))
    if config.out:
        from audiomae.storage import write_json

        write_json(config.out, summary(answers))
    return answers


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, send, argv)


def labelled_queries(src: str, label: str = "label") -> list[Query]:
    """The rows of a corpus that have a label.

    Raises:
        UserError: there are none.
    """
    from audiomae.corpus.manifest import list_corpus

    corpus = list_corpus(src)
    rows = [row for table in corpus.batches() for row in table.to_pylist()]
    queries = [Query(corpus.root, row["uri"], str(row[label])) for row in rows if row.get(label)]
    if not queries:
        raise UserError(
            f"--queries {src}: no row has a {label!r}; use a folder of class folders, or a listing with one"
        )
    return queries


def ask_all(url: str, queries: list[Query], k: int = 5, label: str = "label") -> list[DemoAnswer]:
    """Send every query to the service at `url`; a request that fails for a passing reason is sent again.

    Raises:
        UserError: the service does not answer, or refuses a query (with its reason).
    """
    import httpx

    with httpx.Client(base_url=url, timeout=60) as client:
        return list(_answers(client, queries, k, label))


def table(answers: list[DemoAnswer]) -> str:
    """A text table of queries, their top hits with scores, right or wrong, and R@1 below."""
    width = max((len(answer.query.uri) for answer in answers), default=5)
    lines = [f"{'query':{width}}  {'class':12}  {'':5}  top hits (cosine)"]
    for answer in answers:
        hits = ", ".join(
            f"{label} {score:.3f}" for label, score in list(zip(answer.labels, answer.scores, strict=True))[:HITS_SHOWN]
        )
        verdict = "right" if answer.right else "wrong"
        lines.append(f"{answer.query.uri:{width}}  {answer.query.label:12}  {verdict}  {hits}")
    facts = summary(answers)
    lines.append(
        f"R@1 {facts['recall_at_1']:.3f} ({facts['right']} of {facts['queries']} right), "
        f"median answer {facts['median_ms']:.0f} ms"
    )
    return "\n".join(lines)


def summary(answers: list[DemoAnswer]) -> dict[str, Any]:
    """Counts, R@1 and the median answer time as plain values."""
    times = sorted(answer.milliseconds for answer in answers)
    right = sum(answer.right for answer in answers)
    return {
        "queries": len(answers),
        "right": right,
        "recall_at_1": right / max(1, len(answers)),
        "median_ms": times[len(times) // 2] if times else 0.0,
    }


def _answers(client: "httpx.Client", queries: list[Query], k: int, label: str) -> Iterator[DemoAnswer]:
    for query in queries:
        data = _read(query)
        started = time.perf_counter()
        body = _post(client, query.uri, data, k)
        milliseconds = (time.perf_counter() - started) * 1000
        results = body["results"]
        labels = [str(hit["item"].get(label)) for hit in results]
        yield DemoAnswer(query, labels, [hit["score"] for hit in results], milliseconds)


def _post(client: "httpx.Client", name: str, data: bytes, k: int) -> dict[str, Any]:
    import httpx

    def ask() -> dict[str, Any]:
        reply = client.post("/search", files={"file": (Path(name).name, data)}, data={"k": str(k)})
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer

    def may_pass(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code >= 500
        return isinstance(error, httpx.TransportError)

    try:
        return retry(ask, may_pass, ATTEMPTS, first_wait_s=0.4)
    except httpx.HTTPStatusError as error:
        problem = f"{error.response.status_code}: {error.response.text[:500]}"
    except httpx.TransportError as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{client.base_url}: no answer to {name}: {problem}")


def _read(query: Query) -> bytes:
    from audiomae.corpus.manifest import open_source

    source = open_source(query.root, query.uri)
    if isinstance(source, Path):
        return source.read_bytes()
    return source if isinstance(source, bytes) else source.read()


if __name__ == "__main__":
    run_job(main)
