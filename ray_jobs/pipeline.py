"""The whole line in one command: train -> embed -> index -> evaluate, each stage as its own job would run it.

The config is a training recipe, as `train.py` takes it, with a section for each later stage where its defaults do not
fit (`--set embed.per_file=true`). Every stage resumes, so relaunching the same line picks up where it stopped.
"""

import time
from collections.abc import Callable
from typing import Any

import yaml

from audiomae.artifacts.embeddings import EmbeddingSet
from audiomae.cli import job_parser, run_job
from audiomae.config import StrictConfig, build_config, load_config
from audiomae.errors import ConfigError
from audiomae.search.build_plan import BuildConfig
from audiomae.storage import to_path, write_bytes, write_json
from audiomae.training.recipe import TrainConfig
from ray_jobs import build_index, embed_corpus, evaluate_retrieval, train
from ray_jobs._ray import connect

EXAMPLE = "python ray_jobs/pipeline.py --config ray_jobs/recipes/demo.yaml --corpus sounds/ --out runs/first"


class PipelineConfig(TrainConfig):
    """A training recipe, and what the later stages are to do otherwise than by default."""

    embed: dict[str, Any] = {}
    index: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


def main(argv: list[str] | None = None) -> int:
    """Run the stages in order; the exit status of the first that fails, else 0."""
    parser = job_parser(__doc__ or "", EXAMPLE)
    parser.add_argument(
        "--corpus", required=True, metavar="SRC", help="folder, glob, s3:// prefix, listing or .tar shards"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="gets train/ embeddings/ index/ evaluation/")
    parser.add_argument("--encoder", metavar="ENC", help="use this encoder instead of training one")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="what makes two clips alike, for evaluation")
    parser.add_argument("--group", metavar="COLUMN", help="evaluate with queries of one group against the others")
    args = parser.parse_args(argv)
    config = load_config(PipelineConfig, args.config, args.sets)
    out = to_path(args.out)
    encoder = args.encoder or str(out / "train" / "encoder")
    embeddings = out / "embeddings"
    _check(config, encoder, args.corpus, str(embeddings))

    connect()
    run = _Stages(out)
    if not args.encoder:
        recipe = config.model_dump(mode="json", exclude={"embed", "index", "evaluate"})
        run("train", train.main, recipe, ["--corpus", args.corpus, "--storage", str(out), "--name", "train"])
    run(
        "embed",
        embed_corpus.main,
        config.embed,
        ["--encoder", encoder, "--corpus", args.corpus, "--out", str(embeddings)],
    )
    run(
        "index",
        build_index.main,
        config.index,
        ["--embeddings", str(embeddings), "--encoder", encoder, "--out", str(out / "index")],
    )
    if not run.failed and args.label in EmbeddingSet.open(embeddings).column_names:
        protocol = ["--embeddings", str(embeddings), "--label", args.label, "--out", str(out / "evaluation")]
        run(
            "evaluate",
            evaluate_retrieval.main,
            config.evaluate,
            [*protocol, *(["--group", args.group] if args.group else [])],
        )
    elif not run.failed:
        print(f"evaluate: skipped, the corpus has no column {args.label!r}")
    return run.summary()


def _check(config: PipelineConfig, encoder: str, corpus: str, out: str) -> None:
    """Refuse a bad key of a late stage before the first one spends its hours."""
    named = {"encoder": encoder, "corpus": corpus, "out": out}
    sections: list[tuple[str, type[StrictConfig], dict[str, Any]]] = [
        ("embed", embed_corpus.EmbedConfig, {**config.embed, **named}),
        ("index", BuildConfig, config.index),
        ("evaluate", evaluate_retrieval.EvaluateConfig, config.evaluate),
    ]
    for section, cls, values in sections:
        try:
            build_config(cls, values)
        except ConfigError as error:
            raise ConfigError(f"in section {section}: {error}") from None


class _Stages:
    """Runs stages, keeps their config and wall time under OUT."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self.failed = 0

    def __call__(
        self, name: str, stage: Callable[[list[str] | None], int], config: dict[str, Any], arguments: list[str]
    ) -> None:
        if self.failed:
            return
        path = self.out / "config" / f"{name}.yaml"
        write_bytes(path, yaml.safe_dump(config, sort_keys=False).encode())
        print(f"== {name}", flush=True)
        started = time.monotonic()
        self.failed = stage(["--config", str(path), *arguments])
        self.seconds[name] = round(time.monotonic() - started, 1)

    def summary(self) -> int:
        """Print the wall times and where things lie; the exit status."""
        write_json(self.out / "pipeline.json", {"seconds": self.seconds})
        print("== pipeline: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()))
        if not self.failed:
            print(f"all of it lies in {self.out}; to serve it: serve run serve.app:build index={self.out / 'index'}")
        return self.failed


if __name__ == "__main__":
    run_job(main)
