"""Train an encoder on Ray Train. Running the same line again resumes; a finished run says so and does nothing.

STORAGE/NAME holds `config.yaml` (resolved), `items.parquet` (the clips and their split), `metrics.jsonl` and
`tensorboard/` (one record per epoch), Ray Train's checkpoints (best and last), `encoder/`, and `train.json`, the
receipt that says the run is finished.
"""

from audiomae.cli import Command, run_command, run_job
from ray_jobs.configs import RECIPES, TrainConfig, TrainResult

COMMAND = Command(
    script="ray_jobs/train.py",
    config=TrainConfig,
    about=__doc__ or "",
    example="python ray_jobs/train.py --corpus sounds/ --storage runs --name first",
    recipes=RECIPES,
)


def train(config: TrainConfig) -> TrainResult:
    """Train an encoder, or finish a run that was interrupted, or find that it is finished.

    Raises:
        ConfigError: the run was started with another recipe.
        UserError: no such corpus, too few clips that can be decoded, or a loss that is not finite.
    """
    from ray_jobs.training.job import run

    return run(config)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run_command(COMMAND, train, argv)


if __name__ == "__main__":
    run_job(main)
