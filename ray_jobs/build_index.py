"""Build or extend a searchable index: embedding sets -> parts -> one index -> a published, checksummed release.

Rows and index parts are made as Ray tasks; relaunching the same line finds what was finished, and a finished build says
so and does nothing. More embedding sets, or an embedding set that grew, extend the release in force.
"""

from typing import TYPE_CHECKING

from audiomae.cli import Command, run_command, run_job
from ray_jobs.configs import BuildConfig

if TYPE_CHECKING:
    from audiomae.artifacts.releases import Release

COMMAND = Command(
    script="ray_jobs/build_index.py",
    config=BuildConfig,
    about=__doc__ or "",
    example="python ray_jobs/build_index.py --embeddings runs/embeddings --encoder runs/first/encoder --out runs/index",
)


def build(config: BuildConfig) -> "Release":
    """Publish a release of all that is embedded, or return the one in force when it holds all of it.

    Raises:
        UserError: nothing to index, or a recall that the index does not reach (nothing is published then).
        IntegrityError: embeddings of several encoders, or bytes that are not what their receipt says.
        ReleaseConflictError: another build published meanwhile.
    """
    from ray_jobs.indexing.job import run

    return run(config)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, build, argv)


if __name__ == "__main__":
    run_job(main)
