"""Compare the poolings of encoders that are there: each backbone encodes the corpus once, every pooling is scored.

Prints a table with paired tests against the first row and writes it to OUT, with comparison.json beside it.
"""

from audiomae.cli import Command, run_command, run_job
from ray_jobs.configs import CompareConfig, Comparison

COMMAND = Command(
    script="ray_jobs/compare.py",
    config=CompareConfig,
    about=__doc__ or "",
    example="python ray_jobs/compare.py --encoder runs/first/encoder --corpus sounds/ --out runs/poolings",
)


def compare(config: CompareConfig) -> Comparison:
    """Score poolings on the same files.

    Raises:
        ConfigError: a pooling that does not fit an encoder, with the reason.
        UserError: no such corpus or label column, or not one file that can be decoded.
    """
    from ray_jobs.comparing.job import run

    return run(config)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, compare, argv)


if __name__ == "__main__":
    run_job(main)
