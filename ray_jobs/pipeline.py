"""The whole line in one command: train -> embed -> index -> evaluate, each stage as its own job would run it.

The config is a training recipe, as `train.py` takes it, with a section for each later stage where its defaults do not
fit (`--embed.per-file`). Every stage resumes, so relaunching the same line picks up where it stopped.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from audiomae.cli import Command, run_command, run_job
from audiomae.config import StrictConfig, dump_config
from ray_jobs.build_index import build
from ray_jobs.configs import (
    RECIPES,
    BuildConfig,
    EmbedConfig,
    EvaluateConfig,
    Evaluation,
    PipelineConfig,
    PipelineResult,
    TrainConfig,
)
from ray_jobs.embed_corpus import embed
from ray_jobs.evaluate_retrieval import evaluate
from ray_jobs.train import train

COMMAND = Command(
    script="ray_jobs/pipeline.py",
    config=PipelineConfig,
    about=__doc__ or "",
    example="python ray_jobs/pipeline.py --corpus sounds/ --out runs/first",
    recipes=RECIPES,
)
Config = TypeVar("Config", bound=StrictConfig)
Result = TypeVar("Result")


def pipeline(config: PipelineConfig) -> PipelineResult:
    """Run the stages in order; each finds what an earlier call of it finished.

    Raises:
        AudioMAEError: what the stage that failed raised; the later ones are not begun.
    """
    from audiomae.storage import to_path, write_json
    from ray_jobs._ray import connect

    out = to_path(config.out)
    connect()
    stage = _Stages(out)
    trained, encoder = None, config.with_encoder
    if encoder is None:
        settings = TrainConfig(**config.training, corpus=config.corpus, storage=str(out), name="train")
        trained = stage("train", train, settings)
        encoder = trained.encoder
    embedding = EmbedConfig(**_fields(config.embed), encoder=encoder, corpus=config.corpus, out=str(out / "embeddings"))
    embedded = stage("embed", embed, embedding)
    index = str(out / "index")
    stage("index", build, BuildConfig(**_fields(config.index), embeddings=(embedded.out,), encoder=encoder, out=index))
    evaluation = _evaluate(config, stage, embedded.out)
    write_json(out / "pipeline.json", {"seconds": stage.seconds})
    print("== pipeline: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stage.seconds.items()))
    print(f"all of it lies in {out}; to serve it: serve run serve.app:build index={index}")
    return PipelineResult(trained, embedded, index, evaluation, stage.seconds)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, pipeline, argv)


def _evaluate(config: PipelineConfig, stage: "_Stages", embeddings: str) -> Evaluation | None:
    """The report, where the corpus has the label column that it needs."""
    from audiomae.artifacts.embeddings import EmbeddingSet

    if config.label not in EmbeddingSet.open(embeddings).column_names:
        print(f"evaluate: skipped, the corpus has no column {config.label!r}")
        return None
    named = {"label": config.label, "group": config.group}
    protocol = {**_fields(config.evaluate), **{name: value for name, value in named.items() if value is not None}}
    settings = EvaluateConfig(**protocol, embeddings=embeddings, out=str(stage.out / "evaluation"))
    return stage("evaluate", evaluate, settings)


def _fields(config: StrictConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).model_fields}


class _Stages:
    """Runs stages; keeps the config of each and its wall time under OUT."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, job: Callable[[Config], Result], config: Config) -> Result:
        from audiomae.storage import write_bytes

        write_bytes(self.out / "config" / f"{name}.yaml", dump_config(config).encode())
        print(f"== {name}", flush=True)
        started = time.monotonic()
        result = job(config)
        self.seconds[name] = round(time.monotonic() - started, 1)
        return result


if __name__ == "__main__":
    run_job(main)
