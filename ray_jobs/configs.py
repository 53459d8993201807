"""What each job takes and gives: one config and one result a job, plain values that load nothing heavy.

Every field of a config is a key of its YAML files and a flag of its command line, under the same name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from audiomae.config import StrictConfig, output, shown_as
from audiomae.corpus.damage import OnDamage
from audiomae.corpus.read_as import CHANNEL, ReadAs
from audiomae.evaluation.protocol import ProtocolConfig
from audiomae.model.encoder_config import PoolingName
from audiomae.search.spec import BuildOptions
from audiomae.training.recipe import Recipe
from ray_jobs._placement import PlacementConfig

RECIPES = Path(__file__).resolve().parent / "recipes"
CORPUS = "folder, glob, s3:// prefix, .csv/.jsonl/.parquet listing or .tar shards"
RECIPE = (
    "auto = what fits the corpus and the machine, which it says; a file of ray_jobs/recipes by name; none = the plain "
    "defaults. Keys that are given win. Default: auto, unless the network, its losses or init are given"
)
ENCODER = "encoder folder or URI, official:PATH, timm:NAME or timm:local-dir:PATH"
Folders = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class TrainConfig(Recipe):
    """A recipe, what it is applied to, and where the run is kept."""

    corpus: str = Field(description=CORPUS, json_schema_extra=shown_as("SRC"))
    storage: str = Field(description="where runs are kept, local or s3://", json_schema_extra=output("DIR"))
    name: str = Field(description="name of the run; STORAGE/NAME holds all of it", json_schema_extra=shown_as("RUN"))
    recipe: str | None = Field(None, description=RECIPE, json_schema_extra=shown_as("NAME"))

    @property
    def training(self) -> Recipe:
        """What decides the run, whatever it is applied to."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.model_fields})


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        encoder: the folder of the trained encoder, for `AudioEncoder.load` and the `encoder` of the other jobs.
        fingerprint: of the encoder.
        clips: clips that were trained on or held out; failed_files: files that could not be decoded.
        epoch, loss: of the exported checkpoint.
        validation: mAP and R@1 on the held-out clips, by name; empty where nothing was held out.
        seconds: of the run that finished it.
        resumed: whether there was nothing left to do.
    """

    encoder: str
    fingerprint: str
    clips: int
    failed_files: int
    epoch: int
    loss: float
    validation: dict[str, float]
    seconds: float
    resumed: bool = False


class EmbedOptions(PlacementConfig, ReadAs):
    """How a corpus is embedded."""

    window_s: float | None = Field(
        None,
        gt=0,
        description="window length in seconds; default: a whole file if files are short, else the encoder's",
    )
    hop_s: float | None = Field(None, gt=0, description="distance between window starts; default: window_s")
    per_file: bool = Field(False, description="one vector per file, the mean over its windows")
    silence: Literal["skip", "keep"] | None = Field(
        None, description="windows without signal: skip = rows of silent/ (default), keep = embed them like any other"
    )
    silence_db: float | None = Field(None, description="a window with a lower peak is silent, in dBFS; default: -60")
    silence_range_db: float | None = Field(
        None, gt=0, description="a window this far below the loudest of its file is silent, too, in dB; default: 50"
    )
    on_damage: OnDamage | None = Field(
        None, description="salvage = embed the rest of a damaged file, its lost spans in failures/ (default); fail"
    )
    channel: str | None = Field(
        None, pattern=CHANNEL, description="mix = all to one (default), left, right, or a channel's number, from 0"
    )
    pooling: PoolingName | None = Field(
        None,
        description="pool the encoder's tokens so; default: as it was trained. The re-pooled encoder is OUT/encoder",
    )
    retry_failed: bool = Field(False, description="embed again the files in failures/")
    update: bool = Field(
        False, description="take over a changed corpus: embed what is new or changed, drop what is gone"
    )
    check: bool = Field(
        False, description="only report on the corpus: formats, lengths, bad files, labels, duplicates; OUT/check.json"
    )
    check_files: int | None = Field(None, ge=1, description="files that --check decodes; default: 512, or 64 of more")
    dry_run: bool = Field(False, description="--check, and what it would take: audio hours, time, disk, memory")
    max_failure_rate: float = Field(0.5, ge=0, le=1, description="fail when more than this share of the files failed")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="windows per encoder call; default: 8 on a CPU, 512 on a GPU; halved where memory is short",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="precision of the encoder's arithmetic; auto: bfloat16 on a GPU that has it, float32 on every CPU",
    )
    compile: bool | None = Field(
        None, description="fuse the encoder's blocks on a GPU (torch.compile); default: from 50,000 files on"
    )
    allow_precision_change: bool = Field(
        False, description="let --dtype differ from what is in --out already; each receipt records its own"
    )
    vector_dtype: Literal["float32", "float16"] = Field("float32", description="precision of the stored embeddings")
    shard_minutes: float | None = Field(
        None, gt=0, description="minutes of audio per shard, about; default: 1 to 30 by corpus size"
    )
    stall_timeout_s: float = Field(600.0, gt=0, description="give up on a file that yields no audio for so long")
    price_per_hour: float | None = Field(
        None, ge=0, description="price of the cluster, to print what 1,000 audio hours cost"
    )

    @model_validator(mode="after")
    def _check(self) -> "EmbedOptions":
        if self.hop_s is not None and self.window_s is None:
            raise ValueError("hop_s needs window_s")
        return self


class EmbedConfig(EmbedOptions):
    """What is embedded, with which encoder, and where the vectors go."""

    encoder: str = Field(description=ENCODER, json_schema_extra=shown_as("ENC"))
    corpus: str = Field(description=CORPUS, json_schema_extra=shown_as("SRC"))
    out: str = Field(description="where the embeddings go, local or s3://", json_schema_extra=output("DIR"))


@dataclass(frozen=True)
class EmbedResult:
    """An embedded corpus: inputs = embedded + failed, in files; windows = rows + silent.

    Attributes:
        out: the folder, for the `embeddings` of the later jobs.
        inputs, embedded, failed: files.
        damaged: spans that were lost of files that were embedded.
        silent: windows without signal, which got no embedding.
        rows: embeddings.
        estimate: what `dry_run` found; the counts are 0 then, and after `check`.
    """

    out: str
    inputs: int = 0
    embedded: int = 0
    failed: int = 0
    damaged: int = 0
    silent: int = 0
    rows: int = 0
    estimate: dict[str, Any] | None = None


class BuildConfig(BuildOptions):
    """Which embeddings are indexed, with which encoder beside them, and where the index goes."""

    embeddings: Folders = Field(
        (), description="folders written by embed_corpus.py; repeatable", json_schema_extra=shown_as("DIR")
    )
    encoder: str | None = Field(
        None, description="goes into the release; default: that of the embeddings", json_schema_extra=shown_as("ENC")
    )
    out: str = Field(description="index folder, local or s3://", json_schema_extra=output("INDEX"))
    delete_ids: str | None = Field(
        None, description="text file of clip ids to delete for good, one a line", json_schema_extra=shown_as("FILE")
    )
    undelete: str | None = Field(
        None, description="text file of deleted clip ids to find again, one a line", json_schema_extra=shown_as("FILE")
    )
    remove: Folders = Field(
        (), description="indexed embeddings whose clips are forgotten; repeatable", json_schema_extra=shown_as("DIR")
    )


class EvaluateOptions(ProtocolConfig):
    """The protocol, and what the report holds."""

    baselines: tuple[Literal["mfcc", "logmel", "random"], ...] = Field(
        (), description="computed from the corpus' audio, to compare with; the bare flag means all"
    )
    worst_queries: int = Field(8, ge=0, description="how many of the worst queries to draw")
    map: Literal["t-SNE", "PCA"] = Field("t-SNE", description="projection of the 2-D map")


class EvaluateConfig(EvaluateOptions):
    """Which embeddings are evaluated, what they are compared with, and where the report goes."""

    embeddings: str = Field(description="folder written by embed_corpus.py", json_schema_extra=shown_as("DIR"))
    out: str = Field(description="gets metrics.json, report.html and plots/*.png", json_schema_extra=output("DIR"))
    compare: Folders = Field(
        (), description="other embeddings of the same corpus; repeatable", json_schema_extra=shown_as("DIR")
    )


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        out: its folder.
        metrics: what metrics.json holds: `mAP`, `R@1` and the others at the top, then where they come from.
        report: the HTML page.
    """

    out: str
    metrics: dict[str, Any]
    report: str


class CompareConfig(ProtocolConfig):
    """Encoders whose poolings are compared, on which corpus, by which protocol."""

    encoder: Folders = Field(min_length=1, description=ENCODER + "; repeatable", json_schema_extra=shown_as("ENC"))
    corpus: str = Field(description=CORPUS, json_schema_extra=shown_as("SRC"))
    out: str = Field(description="gets comparison.md and comparison.json", json_schema_extra=shown_as("DIR"))
    pooling: tuple[PoolingName, ...] | None = Field(
        None, description="poolings to compare, the first with each other; default: all that need no training"
    )


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder, and the means of mAP, R@1, R@5 and kNN by the name of the pooling."""

    out: str
    results: dict[str, dict[str, float]]


class StageOptions(Recipe):
    """A training recipe, and what the later stages are to do otherwise than by default."""

    embed: EmbedOptions = Field(EmbedOptions(), description="how the corpus is embedded")
    index: BuildOptions = Field(BuildOptions(), description="how the index is built")
    evaluate: EvaluateOptions = Field(EvaluateOptions(), description="how it is evaluated")

    recipe: str | None = Field(None, description=RECIPE, json_schema_extra=shown_as("NAME"))

    @property
    def training(self) -> dict[str, Any]:
        """The keys of the training recipe that were given, and which recipe they are laid over."""
        return {name: getattr(self, name) for name in self.model_fields_set if name in {"recipe", *Recipe.model_fields}}


class PipelineConfig(StageOptions):
    """All stages in a row, from a corpus to an index and a report."""

    corpus: str = Field(description=CORPUS, json_schema_extra=shown_as("SRC"))
    out: str = Field(description="gets train/ embeddings/ index/ evaluation/", json_schema_extra=output("DIR"))
    with_encoder: str | None = Field(
        None,
        description="use this encoder instead of training one: " + ENCODER,
        json_schema_extra=shown_as("ENC", "--encoder"),
    )
    label: str = Field("label", description="column that says what is relevant", json_schema_extra=shown_as("COLUMN"))
    group: str | None = Field(
        None,
        description="evaluate with queries of one group against the others",
        json_schema_extra=shown_as("COLUMN"),
    )


@dataclass(frozen=True)
class PipelineResult:
    """What each stage gave; `trained` is None with an encoder that was there, `evaluation` without a label column."""

    trained: TrainResult | None
    embedded: EmbedResult
    index: str
    evaluation: Evaluation | None
    seconds: dict[str, float]


class DemoConfig(StageOptions):
    """The demo: a generated corpus, trained on, indexed, served and queried."""

    out: str = Field("demo", description="everything goes here", json_schema_extra=output("DIR"))
    clips: int = Field(480, ge=1, description="size of the generated corpus")
    queries: int = Field(48, ge=1, description="clips to query with; none of them is in the corpus")
    port: int = Field(8000, ge=0, description="port of the service, on loopback")


class QueryConfig(StrictConfig):
    """Labelled clips sent to a running service."""

    url: str = Field(
        "http://127.0.0.1:8000", description="address of the running service", json_schema_extra=shown_as("URL")
    )
    queries: str = Field(description="a labelled corpus, best not the indexed one", json_schema_extra=shown_as("SRC"))
    k: int = Field(5, ge=1, description="hits per query")
    label: str = Field("label", description="column with the class", json_schema_extra=shown_as("COLUMN"))
    limit: int | None = Field(None, ge=1, description="send only the first so many")
    out: str | None = Field(None, description="write the counts as JSON here", json_schema_extra=output("FILE"))


class AblationConfig(Recipe):
    """A recipe, and the rows that change a few of its keys; each is trained and measured fold by fold."""

    corpus: str = Field(description="listing with a label and a fold column", json_schema_extra=shown_as("SRC"))
    out: str = Field(description="results, kept encoders and features", json_schema_extra=output("DIR"))
    results: str | None = Field(
        None, description="where the table goes; default: OUT/results.md", json_schema_extra=output("FILE")
    )
    rows: str = Field(str(RECIPES / "ablations"), description="folder of row files", json_schema_extra=shown_as("DIR"))
    only: tuple[str, ...] | None = Field(
        None, description="these rows and their parents; default: all", json_schema_extra=shown_as("NAME")
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each row is measured with each of them")
    folds: tuple[str, ...] | None = Field(
        None, description="folds that are queries; default: all", json_schema_extra=shown_as("VALUE")
    )
    fold_column: str = Field("fold", description="column of the folds", json_schema_extra=shown_as("COLUMN"))
    cpus_per_run: float = Field(1.0, gt=0, description="CPUs of one run, also its threads")
    gpus_per_run: float | None = Field(None, ge=0, description="default: a quarter of a GPU if there is any")
    text_model: str | None = Field(
        None, description="local text model for rows with a text tower", json_schema_extra=shown_as("DIR")
    )

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, values: Any, handler: Any) -> "AblationConfig":
        config: AblationConfig = handler(values)
        if isinstance(values, dict):
            config._given = {name: value for name, value in values.items() if name in Recipe.model_fields}
        return config

    @property
    def given(self) -> dict[str, Any]:
        """The recipe's keys as they were given, without defaults: what the changes of a row are laid over."""
        return self._given


@dataclass(frozen=True)
class AblationResult:
    """What an ablation did: where its table is, how many runs it has, and the reason by run of those that failed."""

    table: str
    runs: int
    failures: dict[str, str]
