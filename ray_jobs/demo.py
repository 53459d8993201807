"""From raw audio to a live answer: generate -> train -> embed -> index -> serve -> query, then stop everything.

The corpus has five folds; the encoder is trained on four of them and measured on the fifth, and the live queries are
clips that are in neither. The same line with an untrained encoder runs beside it, to show what training is worth.
"""

import time
from pathlib import Path

from audiomae import AudioEncoder, AudioIndex
from audiomae.cli import job_parser, run_job
from audiomae.config import load_config
from audiomae.corpus.synthetic import generate
from audiomae.storage import read_json, to_path, write_json
from audiomae.training.recipe import TrainConfig
from ray_jobs import demo_queries, pipeline
from ray_jobs._ray import connect

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
HELD_OUT_FOLD = 5
METRICS = ("mAP", "R@1", "R@5")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when the trained encoder answered better than the untrained one."""
    parser = job_parser(__doc__ or "", "python ray_jobs/demo.py --out demo")
    parser.add_argument("--out", default="demo", metavar="DIR", help="everything goes here (default: demo)")
    parser.add_argument("--clips", type=int, default=480, help="size of the generated corpus")
    parser.add_argument("--queries", type=int, default=48, help="clips to ask with; none of them is in the corpus")
    parser.add_argument("--port", type=int, default=8000, help="of the service, on loopback")
    args = parser.parse_args(argv)
    started = time.monotonic()
    out = Path(args.out).resolve()

    print(f"== generate: {args.clips} clips and some broken files", flush=True)
    corpus = generate(out / "corpus", args.clips) / "listing.csv"
    queries = generate(out / "queries", args.queries, seed=1, bad_files=False) / "listing.csv"

    connect()
    files = [str(RECIPE), *args.config]
    recipe = load_config(pipeline.PipelineConfig, files, args.sets)
    flags = [*(item for file in files for item in ("--config", file)), *(i for s in args.sets for i in ("--set", s))]
    shared = [*flags, "--set", f"data.exclude={{fold: {HELD_OUT_FOLD}}}", "--set", "embed.per_file=true"]
    shared += ["--set", f"evaluate.query_groups=['{HELD_OUT_FOLD}']", "--corpus", str(corpus), "--group", "fold"]
    if status := pipeline.main([*shared, "--out", str(out / "trained")]):
        return status
    print("\nThe same line with an untrained encoder:")
    untrained = untrained_encoder(recipe, out / "untrained" / "encoder")
    if status := pipeline.main([*shared, "--encoder", untrained, "--out", str(out / "untrained")]):
        return status

    print("\n== serve and query", flush=True)
    answers = ask_service(out / "trained" / "index", args.port, str(queries))
    print(demo_queries.table(answers))
    trained = demo_queries.summary(answers)["recall_at_1"]
    before = recall_at_1(AudioEncoder.load(untrained), str(out / "untrained" / "index"), str(queries))
    print_comparison(out, trained, before)
    write_json(out / "demo.json", {"seconds": time.monotonic() - started, "trained": trained, "untrained": before})
    print(f"\n{time.monotonic() - started:.0f} s in all; everything lies in {out}")
    print(f"report: {out / 'trained' / 'evaluation' / 'report.html'}")
    print(f"to play with it, a page and /docs: serve run serve.app:build index={args.out}/trained/index")
    return 0 if trained > before else 1


def untrained_encoder(recipe: TrainConfig, directory: Path) -> str:
    """The encoder of the recipe as it is before the first step, saved."""
    AudioEncoder.from_config(recipe.encoder, seed=recipe.seed).save(directory)
    return str(directory)


def ask_service(index: Path, port: int, queries: str) -> list[demo_queries.Answer]:
    """Serve the index on loopback, send every query over HTTP, shut the service down."""
    from ray import serve

    from serve.app import build

    try:
        serve.run(build({"index": str(index), "port": port}), name="demo")
        return demo_queries.ask_all(f"http://127.0.0.1:{port}", demo_queries.labelled_queries(queries))
    finally:
        serve.shutdown()


def recall_at_1(encoder: AudioEncoder, index: str, queries: str) -> float:
    """Share of the queries whose best hit is of their class, without a service in between."""
    found = demo_queries.labelled_queries(queries)
    vectors = encoder.embed([str(to_path(query.root) / query.uri) for query in found])
    hits = AudioIndex.open(index).search(vectors, k=1)
    return sum(hit[0]["label"] == query.label for hit, query in zip(hits.items, found, strict=True)) / len(found)


def print_comparison(out: Path, trained: float, untrained: float) -> None:
    """Trained beside untrained: the live queries, and the metrics of the fold that was held out of training."""
    print(f"\n{'':34}{'trained':>10}{'untrained':>12}")
    print(f"{'live queries, R@1':34}{trained:10.3f}{untrained:12.3f}")
    reports = [read_json(out / name / "evaluation" / "metrics.json") for name in ("trained", "untrained")]
    for metric in METRICS:
        values = [report[metric] for report in reports]
        print(f"{f'held-out fold {HELD_OUT_FOLD}, {metric}':34}{values[0]:10.3f}{values[1]:12.3f}")


if __name__ == "__main__":
    run_job(main)
