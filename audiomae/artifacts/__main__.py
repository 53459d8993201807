"""Look after what the jobs leave behind: check that it is whole, look at it, go back to an earlier index."""

import argparse
import sys
import time
from collections.abc import Callable

from audiomae.artifacts import catalogue, releases
from audiomae.cli import EXIT_FAILED, EXIT_OK, Progress, run_job

EXAMPLES = """examples:
  python -m audiomae.artifacts verify out/
  python -m audiomae.artifacts show s3://bucket/embeddings
  python -m audiomae.artifacts list runs/index
  python -m audiomae.artifacts rollback s3://bucket/index --version v000003
  python -m audiomae.artifacts gc runs/index --keep 3"""


def main(argv: list[str] | None = None) -> int:
    """Run one action; 0 when it was done."""
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m audiomae.artifacts",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    anything = "what a job wrote (embeddings, index, run, encoder, features, evaluation) or a folder of them; or s3://"
    index = "the directory that build_index.py wrote, local or s3://"
    _add(actions, _verify, "check every file against its receipt; exit 1 and the names of those that differ", anything)
    _add(actions, _show, "what is there: kind, files, bytes and what each says of itself", anything)
    _add(actions, _list, "every publish and rollback of an index, oldest first", index)
    action = _add(actions, _rollback, "put an earlier version of an index in force again", index)
    action.add_argument("--version", help="which one, such as v000003 (default: the one before that in force)")
    action = _add(actions, _gc, "remove old versions of an index; never the one in force", index)
    action.add_argument("--keep", type=int, default=2, help="how many versions stay (default 2)")
    return parser


def _add(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[argparse.Namespace], int],
    text: str,
    about: str,
) -> argparse.ArgumentParser:
    name = run.__name__.strip("_")
    example = next(line.strip() for line in EXAMPLES.splitlines() if f" {name} " in line)
    parser = actions.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.add_argument("path", metavar="PATH", help=about)
    parser.set_defaults(run=run)
    return parser


def _verify(args: argparse.Namespace) -> int:
    started = time.monotonic()
    progress: list[Progress] = []

    def begin(total: int) -> Callable[[int], None]:
        progress.append(Progress("checking", max(1, total >> 20), "MiB"))
        seen = 0

        def on_bytes(count: int) -> None:
            nonlocal seen
            progress[0].update(((seen + count) >> 20) - (seen >> 20))
            seen += count

        return on_bytes

    report = catalogue.verify(args.path, begin)
    for where, reason in sorted(report.problems.items()):
        print(reason if where in reason else f"{where}: {reason}", file=sys.stderr)
    notes = f"; {report.unnamed:,} files have no receipt" if report.unnamed else ""
    print(
        f"{report.files:,} files ({report.bytes / 1e6:,.1f} MB) are what {report.receipts:,} receipts say"
        f"{notes}, {time.monotonic() - started:.1f} s"
    )
    if report.problems:
        print(f"{len(report.problems):,} damaged or missing, named above", file=sys.stderr)
    return EXIT_FAILED if report.problems else EXIT_OK


def _show(args: argparse.Namespace) -> int:
    for line in catalogue.describe(args.path):
        print(line)
    return EXIT_OK


def _list(args: argparse.Namespace) -> int:
    entries = releases.history(args.path)
    for number in entries.numbers():
        entry = entries.read(number)
        print(f"{number:6d}  {entry['action']:8s}  {entry['version']}  by {entry['by']}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    print(f"in force: {releases.rollback(args.path, args.version).version}")
    return 0


def _gc(args: argparse.Namespace) -> int:
    print(f"removed: {', '.join(releases.gc(args.path, args.keep)) or 'nothing'}")
    return 0


if __name__ == "__main__":
    run_job(main)
