"""From raw audio to a live answer: generate -> train -> embed -> index -> serve -> query, then stop everything.

The corpus has five folds; the encoder is trained on four of them and measured on the fifth, and the live queries are
clips that are in neither. The same line with an untrained encoder runs beside it, to show what training is worth.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiomae.cli import EXIT_FAILED, EXIT_OK, Command, run_command, run_job
from ray_jobs.configs import RECIPES, DemoConfig, PipelineConfig, StageOptions
from ray_jobs.pipeline import pipeline

if TYPE_CHECKING:
    from audiomae import AudioEncoder
    from audiomae.training.recipe import Recipe
    from ray_jobs.demo_queries import DemoAnswer

COMMAND = Command(
    script="ray_jobs/demo.py",
    config=DemoConfig,
    about=__doc__ or "",
    example="python ray_jobs/demo.py --out demo",
    default_files=(RECIPES / "demo.yaml",),
)
HELD_OUT_FOLD = 5
METRICS = ("mAP", "R@1", "R@5")


def demo(config: DemoConfig) -> dict[str, float]:
    """Run the demo; R@1 of the live queries by encoder, `trained` and `untrained`."""
    from audiomae import AudioEncoder
    from audiomae.storage import write_json
    from ray_jobs import demo_queries
    from ray_jobs._ray import connect

    started = time.monotonic()
    out = Path(config.out).resolve()
    print(f"== generate: {config.clips} clips and some broken files", flush=True)
    corpus = generated(out / "corpus", config.clips)
    queries = str(generated(out / "queries", config.queries, seed=1, bad_files=False))

    connect()
    line = _line_of(config, corpus)
    pipeline(line(out / "trained", None))
    print("\nThe same line with an untrained encoder:")
    untrained = untrained_encoder(config, out / "untrained" / "encoder")
    pipeline(line(out / "untrained", untrained))

    print("\n== serve and query", flush=True)
    answers = ask_service(out / "trained" / "index", config.port, queries)
    print(demo_queries.table(answers))
    trained = demo_queries.summary(answers)["recall_at_1"]
    before = recall_at_1(AudioEncoder.load(untrained), str(out / "untrained" / "index"), queries)
    print_comparison(out, trained, before)
    write_json(out / "demo.json", {"seconds": time.monotonic() - started, "trained": trained, "untrained": before})
    print(f"\n{time.monotonic() - started:.0f} s in all; everything lies in {out}")
    print(f"report: {out / 'trained' / 'evaluation' / 'report.html'}")
    print(f"to play with it, a page and /docs: serve run serve.app:build index={config.out}/trained/index")
    return {"trained": trained, "untrained": before}


def generated(folder: Path, clips: int, **options: Any) -> Path:
    """The listing of a generated corpus, made unless it is there: a demo that is called again resumes."""
    from audiomae.corpus.synthetic import generate

    listing = folder / "listing.csv"  # comes last
    known = listing.read_text().splitlines()[1:] if listing.exists() else []
    if sum(not line.endswith(",,") for line in known) != clips:
        generate(folder, clips, **options)
    return listing


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 when the trained encoder answered better than the untrained one."""

    def better(config: DemoConfig) -> int:
        found = demo(config)
        return EXIT_OK if found["trained"] > found["untrained"] else EXIT_FAILED

    return run_command(COMMAND, better, argv)


def _line_of(config: DemoConfig, corpus: Path) -> Callable[[Path, str | None], PipelineConfig]:
    """The pipeline's config by folder and encoder: one fold is never trained on, and its clips are the queries."""
    data = config.data.model_copy(update={"exclude": {"fold": HELD_OUT_FOLD}})
    embed = config.embed.model_copy(update={"per_file": True})
    protocol = config.evaluate.model_copy(update={"query_groups": (str(HELD_OUT_FOLD),)})
    stages = {name: getattr(config, name) for name in StageOptions.model_fields}
    stages |= {"data": data, "embed": embed, "evaluate": protocol}
    return lambda out, encoder: PipelineConfig(
        **stages, corpus=str(corpus), group="fold", out=str(out), with_encoder=encoder
    )


def untrained_encoder(recipe: "Recipe", directory: Path) -> str:
    """The encoder of the recipe as it before the first step, saved."""
    from audiomae import AudioEncoder

    AudioEncoder.from_config(recipe.encoder, seed=recipe.seed).save(directory)
    return str(directory)


def ask_service(index: Path, port: int, queries: str) -> "list[DemoAnswer]":
    """Serve the index on loopback, send every query over HTTP, shut the service down."""
    from ray import serve

    from ray_jobs import demo_queries
    from serve.app import build

    try:
        serve.run(build({"index": str(index), "port": port}), name="demo")
        return demo_queries.ask_all(f"http://127.0.0.1:{port}", demo_queries.labelled_queries(queries))
    finally:
        serve.shutdown()


def recall_at_1(encoder: "AudioEncoder", index: str, queries: str) -> float:
    """Share of the queries whose best hit is of their class, without a service in between."""
    from audiomae import AudioIndex
    from audiomae.storage import to_path
    from ray_jobs import demo_queries

    found = demo_queries.labelled_queries(queries)
    vectors = encoder.embed([str(to_path(query.root) / query.uri) for query in found])
    hits = AudioIndex.open(index).search(vectors, k=1)
    return sum(hit[0]["label"] == query.label for hit, query in zip(hits.items, found, strict=True)) / len(found)


def print_comparison(out: Path, trained: float, untrained: float) -> None:
    """Trained beside untrained: the live queries, and the metrics of the fold that was held out of training."""
    from audiomae.storage import read_json

    print(f"\n{'':34}{'trained':>10}{'untrained':>12}")
    print(f"{'live queries, R@1':34}{trained:10.3f}{untrained:12.3f}")
    reports = [read_json(out / name / "evaluation" / "metrics.json") for name in ("trained", "untrained")]
    for metric in METRICS:
        values = [report[metric] for report in reports]
        print(f"{f'held-out fold {HELD_OUT_FOLD}, {metric}':34}{values[0]:10.3f}{values[1]:12.3f}")


if __name__ == "__main__":
    run_job(main)
