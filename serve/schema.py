"""What goes over the wire and on the command line: `ServeArgs`, the JSON bodies, and the filter language."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from audiomae.config import StrictConfig, nearest
from serve.problems import Problem

FILTER_HINT = 'expected {"column": value | {"in": [...]} | {"gte": x, "lt": y}}'


class ServeArgs(StrictConfig):
    """Arguments of `serve run serve.app:build KEY=VALUE ...` and of `args:` in `serve/config.yaml`."""

    index: str = Field(min_length=1, description="directory or s3:// prefix that build_index.py wrote")
    version: str = Field(default="latest", description="release to serve; `latest` follows INDEX/LATEST at start")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 opens the service to the network")
    port: int | None = Field(default=None, ge=1, le=65535, description="HTTP port, 8000 unless given")
    device: str = Field(default="auto", description="where the encoder runs: auto, cpu, cuda")
    dtype: str = Field(default="auto", description="precision of the encoder: auto, float32, bfloat16")
    encoder_threads: int = Field(default=0, ge=0, description="torch threads of an encoder replica; 0 = all cores")
    api_replicas: int = Field(default=1, ge=1)
    encoder_replicas: int = Field(default=1, ge=1)
    index_replicas: int = Field(default=1, ge=1)
    max_batch_size: int = Field(default=16, ge=1, description="windows encoded together at most")
    batch_wait_ms: float = Field(
        default=0.0, ge=0, description="how long a window waits for company; 0 = batches form while the encoder is busy"
    )
    max_upload_mib: float = Field(default=32.0, gt=0, description="larger request bodies are refused (413)")
    max_audio_s: float = Field(default=600.0, gt=0, description="longer uploads are refused (422)")
    max_decode_s: float = Field(default=20.0, gt=0, description="decoding an upload may take this long")
    decode_threads: int = Field(default=4, ge=1, description="uploads decoded at the same time in one API replica")
    request_timeout_s: float = Field(default=30.0, gt=0, description="longest wait for the encoder or the index (504)")
    max_k: int = Field(default=1000, ge=1, description="most hits per query")
    max_vectors: int = Field(default=256, ge=1, description="most queries in one /search/vector call")


def check_filter(given: str | dict[str, Any] | None, columns: Sequence[str]) -> dict[str, Any] | None:
    """Parse a filter and check its columns; the index checks the conditions against the columns' types.

    Args:
        given: a JSON text (from a form or a query string), an object (from a JSON body), or nothing.
        columns: names that may be filtered on.

    Returns:
        The filter as plain Python values, `None` when there is none.

    Raises:
        Problem: 422 `bad_filter`, or 422 `unknown_column` naming the nearest column.
    """
    if given is None or given == "" or given == {}:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (json.JSONDecodeError, RecursionError) as error:
            raise Problem(422, "bad_filter", f"filter is not JSON ({error}); {FILTER_HINT}") from None
    if not isinstance(given, dict):
        raise Problem(422, "bad_filter", f"filter is a {type(given).__name__}; {FILTER_HINT}")
    for column, condition in given.items():
        if column not in columns and not (column == "any" and isinstance(condition, list)):
            raise Problem(422, "unknown_column", f"filter: no column {column!r}{nearest(column, columns)}")
    return given


class VectorQuery(BaseModel):
    """Body of POST /search/vector."""

    model_config = ConfigDict(extra="forbid")
    vectors: list[list[FiniteFloat]] = Field(min_length=1, description="queries, each of the encoder's dimension")
    k: int = Field(default=10, ge=1)
    filter: dict[str, Any] | None = None


class TextQuery(BaseModel):
    """Body of POST /search/text."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1, max_length=2000)
    k: int = Field(default=10, ge=1)
    filter: dict[str, Any] | None = None


class ReloadRequest(BaseModel):
    """Body of POST /admin/reload."""

    model_config = ConfigDict(extra="forbid")
    version: str = Field(default="latest", min_length=1, max_length=200)


class Links(BaseModel):
    """Where a hit's parts are, relative to the service's root. (JavaScript cannot hold a 63-bit id in a number.)"""

    item: str
    audio: str
    spectrogram: str
    similar: str


class Hit(BaseModel):
    """One item of the index and how near it is."""

    id: int = Field(description="63-bit clip id; parse it as an integer, never as a double")
    uri: str
    start_s: float
    end_s: float
    score: float = Field(description="cosine similarity, 1 = same direction")
    item: dict[str, Any] = Field(description="the item's other columns")
    links: Links
    query_start_s: float | None = Field(default=None, description="mode=windows: where in the query the match lies")
    query_end_s: float | None = None


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    decode: float = 0.0
    encode: float = 0.0
    search: float = 0.0
    total: float = 0.0


class SearchResponse(BaseModel):
    """Hits of one query, best first."""

    release: str
    results: list[Hit]
    timing_ms: Timing


class VectorSearchResponse(BaseModel):
    """Hits of /search/vector: one list per query, in the order of the vectors."""

    release: str
    results: list[list[Hit]]
    timing_ms: Timing


class Embedding(BaseModel):
    """One window of an upload as a vector."""

    start_s: float
    end_s: float
    vector: list[float]


class EmbedResponse(BaseModel):
    """Vectors of an upload: of the whole clip, and of its windows."""

    fingerprint: str
    dim: int
    vector: list[float]
    windows: list[Embedding]
    timing_ms: Timing


class ItemResponse(BaseModel):
    """One row of the items table."""

    release: str
    id: int
    uri: str
    start_s: float
    end_s: float
    item: dict[str, Any]
    links: Links


class ReleaseInfo(BaseModel):
    """What is being served."""

    version: str
    fingerprint: str
    rows: int
    dim: int
    columns: list[str]
    sample_rate: int
    window_s: float
    text: bool
    text_reason: str | None
    device: str


class Health(BaseModel):
    """Answer of /healthz and /readyz."""

    status: Literal["ok", "ready"]
    release: str | None = None
