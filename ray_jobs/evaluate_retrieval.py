"""How well do embeddings find their own class? Metrics, intervals, paired tests and one report with pictures.

Reads an embedding folder, lets its rows query each other (queries of one group against the other groups, or
leave-one-out), sets other runs and simple baselines beside it, and writes metrics.json, report.html and PNG files.
"""

from audiomae.cli import Command, run_command, run_job
from ray_jobs.configs import EvaluateConfig, Evaluation

COMMAND = Command(
    script="ray_jobs/evaluate_retrieval.py",
    config=EvaluateConfig,
    about=__doc__ or "",
    example="python ray_jobs/evaluate_retrieval.py --embeddings runs/embeddings --label label --baselines "
    "--out runs/evaluation",
)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate embeddings, or find that the same ones were evaluated under the same protocol.

    Raises:
        UserError: no such embeddings, an unfinished set, a column that is not there, no query or no gallery left.
    """
    from ray_jobs.evaluating.job import run

    return run(config)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, evaluate, argv)


if __name__ == "__main__":
    run_job(main)
