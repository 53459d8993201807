"""Look after what the jobs leave behind: put an earlier version of an index in force again, remove old ones."""

import argparse

from audiomae.artifacts import releases
from audiomae.cli import run_job

EXAMPLES = """examples:
  python -m audiomae.artifacts list runs/index
  python -m audiomae.artifacts rollback s3://bucket/index --version v000003"""


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
    for run, text in ((_list, "every publish and rollback of an index, oldest first"),):
        _add(actions, run, text, "INDEX", "directory that build_index.py wrote, local or s3://")
    action = _add(actions, _rollback, "put an earlier version of an index in force again", "INDEX", "as for list")
    action.add_argument("--version", help="which one, such as v000003 (default: the one before that in force)")
    action = _add(actions, _gc, "remove old versions of an index; never the one in force", "INDEX", "as for list")
    action.add_argument("--keep", type=int, default=2, help="how many versions stay (default 2)")
    return parser


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


def _add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]", run, text, metavar, about):  # type: ignore[no-untyped-def]
    parser = actions.add_parser(run.__name__.strip("_"), help=text, description=text)
    parser.add_argument("path", metavar=metavar, help=about)
    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    run_job(main)
