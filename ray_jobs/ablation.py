"""Measure what each technique gives: recipes/ablations/*.yaml, each trained on all folds but one, fold by fold.

The rows differ from their parent by a few keys. Each (row, fold, seed) is one Ray task that trains, embeds the whole
corpus, lets its fold query the others and commits one JSON; a relaunch does what is missing. The table is written
anew every few minutes and at the end.
"""

from audiomae.cli import EXIT_FAILED, EXIT_OK, Command, run_command, run_job
from ray_jobs.configs import RECIPES, AblationConfig, AblationResult

COMMAND = Command(
    script="ray_jobs/ablation.py",
    config=AblationConfig,
    about=__doc__ or "",
    example="python ray_jobs/ablation.py --corpus esc10.csv --out runs/ablation --seeds 0 1 2",
    recipes=RECIPES,
    default_files=(RECIPES / "esc10.yaml",),
)


def ablate(config: AblationConfig) -> AblationResult:
    """Measure every row that is not measured yet, and write the table.

    Raises:
        ConfigError: a row, or its recipe, that cannot be used.
        UserError: a corpus without labels or folds.
    """
    from ray_jobs.ablate.job import run

    return run(config)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, or 1 when a run failed."""
    return run_command(COMMAND, lambda config: EXIT_FAILED if ablate(config).failures else EXIT_OK, argv)


if __name__ == "__main__":
    run_job(main)
