"""`ServeArgs`: what `serve run serve.app:build KEY=VALUE ...` and `args:` in `serve/config.yaml` take."""

from pydantic import Field

from audiomae.config import StrictConfig


class ServeArgs(StrictConfig):
    """Arguments of the service. The limits and what each is for: docs/serving.md."""

    index: str = Field(min_length=1, description="directory or s3:// prefix that build_index.py wrote")
    version: str = Field(default="latest", description="release to serve; `latest` follows INDEX/LATEST at start")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 opens the service to the network")
    port: int | None = Field(default=None, ge=1, le=65535, description="HTTP port, 8000 unless given")
    cors: str = Field(default="", description="origin that browsers may call from, or *; empty: same origin only")

    encoder_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs each Encoder replica reserves; default: 1 where the cluster has or may start any, else 0",
    )
    device: str = Field(default="auto", description="where the encoder runs: auto, cpu, cuda")
    dtype: str = Field(default="auto", description="precision of the encoder: auto, float32, bfloat16")
    encoder_threads: int = Field(
        default=0,
        ge=0,
        description="batches encoded at a time by a process on CPUs, each by one thread (several for a query that is "
        "alone); 0 = one for every core, shared out among the API replicas",
    )
    api_replicas: int = Field(
        default=0,
        ge=0,
        description="processes that answer HTTP requests, and encode short queries where there is no GPU; 0: one for "
        "each core, up to 4, and 1 where the index is divided over other processes",
    )
    encoder_replicas: int = Field(default=1, ge=1, description="replicas of the encoder for long uploads, or for a GPU")
    index_shards: int = Field(
        default=0,
        ge=0,
        le=256,
        description="processes that the vectors are divided over, each a deployment Shard0, Shard1, ...; 1: they are "
        "mapped where queries arrive; 0: 1 where they take half of a node's memory at most, else as many as that takes",
    )
    max_batch_size: int = Field(default=16, ge=1, description="windows encoded together at most")

    max_upload_mib: float = Field(default=32.0, gt=0, description="larger request bodies are refused (413)")
    max_header_kib: float = Field(default=16.0, gt=0, description="larger request headers are refused (431)")
    body_patience_s: float = Field(default=10.0, gt=0, description="longest pause within a request body (408)")
    min_upload_kib_s: float = Field(default=8.0, gt=0, description="slowest that a request body may come (408)")
    max_audio_s: float = Field(default=600.0, gt=0, description="longer uploads are refused (422)")
    max_decode_s: float = Field(default=20.0, gt=0, description="CPU seconds that decoding an upload may take")
    short_audio_s: float = Field(
        default=30.0, gt=0, description="longer uploads take the slow lane, so that short ones do not wait for them"
    )
    request_timeout_s: float = Field(default=30.0, gt=0, description="longest wait for an answer (504)")
    max_wait_s: float = Field(default=1.0, gt=0, description="requests that would wait longer than this are shed (503)")
    max_k: int = Field(default=1000, ge=1, description="most hits per query")
    max_vectors: int = Field(default=256, ge=1, description="most queries in one /search/vector call")
    max_hits: int = Field(default=20_000, ge=1, description="most hits in one answer: k x vectors (422)")
    recall_shadow: float = Field(
        default=0.01, ge=0, le=1, description="share of the queries also searched exactly, to measure recall"
    )

    @property
    def processes(self) -> int:
        """How many API replicas share the work; one where nobody has said."""
        return max(1, self.api_replicas)
