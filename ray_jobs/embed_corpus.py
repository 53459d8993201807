"""Embed a corpus of audio files into sharded Parquet, exactly once, however often the job is killed and relaunched.

The corpus is listed and planned once; every shard of the plan is then decoded, encoded and committed by a Ray Data
pipeline. The same command again embeds what is not committed yet, and does nothing when all is.
"""

from pathlib import Path

from audiomae.cli import Command, run_command, run_job
from ray_jobs.configs import EmbedConfig, EmbedResult

COMMAND = Command(
    script="ray_jobs/embed_corpus.py",
    config=EmbedConfig,
    about=__doc__ or "",
    example="python ray_jobs/embed_corpus.py --encoder runs/first/encoder --corpus sounds/ --out runs/embeddings",
)


def embed(config: EmbedConfig) -> EmbedResult:
    """Embed a corpus, or finish one that was interrupted, or find that all of it is embedded.

    Raises:
        UserError: no such corpus or encoder; OUT holds embeddings of another encoder, windowing or corpus; files were
            left unfinished; more than `max_failure_rate` of them failed.
    """
    if _starts_afresh(config):
        from ray_jobs._ray import ENCODER, connect

        connect(loading=[ENCODER])  # both take seconds, mostly of waiting
    from ray_jobs.embed.job import run

    return run(config)


def _starts_afresh(config: EmbedConfig) -> bool:
    """Whether the job will need Ray, as far as can be told without loading anything."""
    if config.check or config.dry_run or "://" in config.encoder + config.out:
        return False
    encoder, out = Path(config.encoder).expanduser(), Path(config.out).expanduser()
    return encoder.is_dir() and not (out / "run.json").exists()


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, embed, argv)


if __name__ == "__main__":
    run_job(main)
