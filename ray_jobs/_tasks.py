"""Many rows, cut into parts, each part a Ray task on any node, the answers in the order of the rows."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from audiomae.cli import Progress
from ray_jobs._ray import connect

TASK_RETRIES = 3
Row = TypeVar("Row")
Answer = TypeVar("Answer")


def answers_of(
    label: str, unit: str, work: Callable[[Sequence[Row]], Sequence[Answer]], rows: Sequence[Row], rows_a_task: int
) -> list[Answer]:
    """`work` of all rows, one answer a row, with a progress line.

    Args:
        label, unit: of the progress line.
        work: a function of some rows that can be sent to another process (a `partial`, too).
        rows: what it is asked about.
        rows_a_task: that many at once.
    """
    import ray

    connect()
    task = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(_call)
    parts = [rows[start : start + rows_a_task] for start in range(0, len(rows), rows_a_task)]
    waiting = [task.remote(work, part) for part in parts]
    answers: list[Answer] = []
    with Progress(label, len(rows), unit) as progress:
        for reference in waiting:
            found = ray.get(reference)
            answers += found
            progress.update(len(found))
    return answers


def _call(work: Callable[[Sequence[Any]], Sequence[Any]], part: Sequence[Any]) -> list[Any]:
    return list(work(part))
