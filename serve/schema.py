"""What goes over the wire: the bodies, forms and answers of every route, as OpenAPI describes them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StrictInt, model_validator

MAX_TEXT = 2000
MAX_ID = 2**63 - 1
Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e6)]
Group = Literal["file", "none"]
GroupField = Annotated[
    Group, Field(description="`file`: one hit a file, its best, with `matches`; `none`: every window")
]
K = Annotated[StrictInt, Field(ge=1, description="hits wanted")]


def _clip_id(value: Any) -> Any:
    """A clip id: an integer, or its digits as text (JavaScript cannot hold 63 bits in a number)."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value


ClipId = Annotated[StrictInt, BeforeValidator(_clip_id), Field(ge=0, le=MAX_ID)]
FilterObject = Annotated[
    dict[str, Any] | None,
    Field(description='for example {"label": "rain"} or {"take": {"gte": 2}}; see docs/serving.md'),
]


class Body(BaseModel):
    """Base of what clients send: unknown members are errors."""

    model_config = ConfigDict(extra="forbid")


class Example(Body):
    """One example of what is (not) wanted: an item (or a stretch of its file), a vector, or an upload by its name."""

    id: ClipId | None = None
    start_s: Seconds | None = Field(default=None, description="with `id`: only this stretch of the item's file")
    end_s: Seconds | None = None
    vector: list[FiniteFloat] | None = Field(default=None, min_length=1)
    upload: str | None = Field(default=None, description="name of a further file field of the same form")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Example":
        if sum(value is not None for value in (self.id, self.vector, self.upload)) != 1:
            raise ValueError("give exactly one of id, vector, upload")
        if self.id is None and (self.start_s is not None or self.end_s is not None):
            raise ValueError("start_s and end_s of an example belong to an id")
        check_region(self.start_s, self.end_s)
        return self


class Examples(Body):
    """Several examples as one query: near the mean of the included, away from the mean of the excluded."""

    include: list[Example] = Field(default=[], max_length=64)
    exclude: list[Example] = Field(default=[], max_length=64)


class VectorQuery(Body):
    """Body of POST /search/vector. (Read without this model: a hundred vectors are 38,400 numbers.)"""

    vectors: list[list[FiniteFloat]] = Field(min_length=1, description="queries, each of the encoder's dimension")
    k: K = 10
    filter: FilterObject = None
    group: GroupField = "file"


class VectorOptions(Body):
    """The members of `VectorQuery` beside the vectors."""

    k: K = 10
    filter: FilterObject = None
    group: Group = "file"


class TextQuery(Body):
    """Body of POST /search/text."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    k: K = 10
    filter: FilterObject = None
    group: GroupField = "file"


class ExamplesQuery(Body):
    """Body of POST /search/examples."""

    examples: Examples
    text: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT, description="words to combine with them")
    k: K = 10
    filter: FilterObject = None
    group: GroupField = "file"
    collapse: bool = Field(default=False, description="drop hits that are near-duplicates of a better one")


class SearchForm(BaseModel):
    """Fields of POST /search (multipart/form-data); `file`, `text` or `examples` must be there."""

    file: bytes = Field(default=b"", description="any audio file; decoded by content, not by name")
    k: int = Field(default=10, ge=1, description="hits wanted")
    filter: str | None = Field(default=None, description='JSON, for example {"label": "rain"}')
    mode: Literal["clip", "windows"] = Field(
        default="clip", description="like all of the upload, or like any part of it (`matches` says which)"
    )
    group: GroupField = "file"
    start_s: Seconds | None = Field(default=None, description="search only this stretch of the upload, from here")
    end_s: Seconds | None = Field(default=None, description="... to here")
    text: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT, description="words to combine with it")
    examples: str | None = Field(default=None, description="JSON of `Examples`: further sounds to include or exclude")
    collapse: bool = Field(default=False, description="drop hits that are near-duplicates of a better one")

    @model_validator(mode="after")
    def _region(self) -> "SearchForm":
        check_region(self.start_s, self.end_s)
        return self


def check_region(start_s: float | None, end_s: float | None) -> None:
    """A stretch of time must have a length. Raises ValueError."""
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ValueError(f"end_s is {end_s:g} and start_s {start_s or 0.0:g}: expected start_s < end_s")


class ReloadRequest(Body):
    """Body of POST /admin/reload."""

    version: str = Field(default="latest", min_length=1, max_length=200)


class Links(BaseModel):
    """Where a hit's parts are, relative to the service's root. (JavaScript cannot hold a 63-bit id in a number.)"""

    item: str
    audio: str
    spectrogram: str
    similar: str


class Span(BaseModel):
    """A stretch of a file that matches: windows that touch, joined."""

    start_s: float
    end_s: float
    score: float = Field(description="of its best window")
    query_start_s: float | None = Field(default=None, description="mode=windows: the stretch of the query it is like")
    query_end_s: float | None = None


class Matches(BaseModel):
    """Which windows of a hit's file are at least as near as the last of the hits."""

    windows: int = Field(description="how many")
    spans: list[Span] = Field(description="where, best first")


class Item(BaseModel):
    """One row of the items table."""

    id: int = Field(description="63-bit clip id; parse it as an integer, never as a double")
    uri: str
    start_s: float
    end_s: float
    item: dict[str, Any] = Field(description="the item's other columns")
    links: Links


class Hit(Item):
    """One item of the index and how near it is."""

    score: float = Field(description="cosine similarity, 1 = same direction")
    probability: float | None = Field(
        default=None, description="that it is of the query's kind, calibrated on held-out clips; null: not calibrated"
    )
    matches: Matches | None = Field(default=None, description="with group=file")
    query_start_s: float | None = Field(default=None, description="mode=windows: where in the query the match lies")
    query_end_s: float | None = None


class Timing(BaseModel):
    """Where the time went, in milliseconds; `queue` (waiting for a place) is in the log and the metrics only."""

    queue: float = Field(default=0.0, exclude=True)
    decode: float = 0.0
    encode: float = 0.0
    search: float = 0.0
    total: float = 0.0


Partial = Annotated[bool, Field(description="a shard of the index did not answer: hits that it has are not there")]
Missing = Annotated[list[str], Field(description='names of these shards, such as "Shard2"')]


class SearchResponse(BaseModel):
    """Hits of one query, best first."""

    release: str
    results: list[Hit]
    timing_ms: Timing
    partial: Partial = False
    missing: Missing = []


class VectorSearchResponse(BaseModel):
    """Hits of /search/vector: one list per query, in the order of the vectors."""

    release: str
    results: list[list[Hit]]
    timing_ms: Timing
    partial: Partial = False
    missing: Missing = []


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


class ItemResponse(Item):
    """One row of the items table and the release it is of."""

    release: str


class ItemsResponse(BaseModel):
    """A page of items."""

    release: str
    total: int = Field(description="items that the filter lets through")
    items: list[Item]


class ExamplesResponse(BaseModel):
    """Six items of the index to listen to and to search with, as different from each other as their columns say."""

    release: str
    items: list[Item]


class FacetValue(BaseModel):
    """A value of a column and how many items have it."""

    value: Any
    count: int


class Facet(BaseModel):
    """What a column holds."""

    column: str
    type: Literal["text", "number", "boolean", "time"]
    distinct: int = Field(description="different values, null not counted")
    nulls: int
    values: list[FacetValue] = Field(description="the commonest, commonest first")
    min: Any = None
    max: Any = None


class FacetsResponse(BaseModel):
    """Counts of the items' columns."""

    release: str
    total: int
    facets: list[Facet]


class MapResponse(BaseModel):
    """Points of the map: sounds that are alike lie together. Lists of one length; ids as text, for JavaScript."""

    release: str
    total: int = Field(description="files in the index")
    shown: int = Field(description="points, one a file; at most 100,000")
    colour: str | None = Field(description="the column that `code` is of")
    values: list[Any] = Field(description="what the codes stand for, commonest first")
    id: list[str]
    x: list[int] = Field(description="0 to 65,535")
    y: list[int]
    code: list[int] = Field(description="place in `values`, -1 for none of them")


class WaveformResponse(BaseModel):
    """The outline of an item's file, or of the minute around the item."""

    start_s: float
    end_s: float
    duration_s: float | None = Field(description="of the file, where its header says so")
    peaks: list[float] = Field(description="largest absolute sample of each of 240 equal stretches")


class ReleaseInfo(BaseModel):
    """What is being served."""

    version: str
    fingerprint: str
    rows: int = Field(description="windows that can be found")
    sounds: int = Field(description="files they are of")
    hours: float = Field(description="of sound")
    dim: int
    columns: list[str]
    sample_rate: int
    window_s: float
    text: bool
    text_reason: str | None
    device: str
    shards: int = Field(default=1, description="processes that the vectors are divided over; 1: not divided")
    missing: list[str] = Field(default=[], description="shards that do not answer now")
    precision: str | None = Field(default=None, description="of the encoder that made the vectors, where recorded")
    calibrated: bool = Field(default=False, description="whether hits come with a `probability`")
    calibration_error: float | None = Field(default=None, description="expected, on queries held out")


class Health(BaseModel):
    """Answer of /healthz and /readyz."""

    status: Literal["ok", "ready"]
    release: str | None = None


class ProblemBody(BaseModel):
    """An error (RFC 9457). Branch on `code`, which never changes; `detail` is for people."""

    model_config = ConfigDict(extra="allow")
    type: str
    title: str
    status: int
    code: str
    detail: str
