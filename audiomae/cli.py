"""What every command of the product has in common: flags made from its config, exit codes, progress with rate and ETA.

A job's config is the one description of its settings. Each field is a flag, with the field's description as its help;
whoever adds a field has added the flag.
"""

import argparse
import os
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import yaml

from audiomae.config import Key, StrictConfig, build_config, config_keys, meant_keys, resolve_tree
from audiomae.errors import AudioMAEError, ConfigError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
PACKAGE_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks what `ray job submit` sends
SAID_AFTER_S, SAID_EVERY_S = 3.0, 10.0
"""No command keeps silent for longer than the first; while nothing changes it speaks again after the second."""
_ABSENT: Any = argparse.SUPPRESS  # flags that were not given leave no value behind


@dataclass(frozen=True)
class Command:
    """One job as a command: its config gives the flags, `parse` gives the config.

    Attributes:
        script: as it is called, such as `ray_jobs/train.py`.
        config: every field is a flag, its description the help; nested ones are called `--optim.lr`, and `--lr` too
            where no other key has that name.
        about: what it does, for the top of `--help`.
        example: a line that works, for `--help` and for the message about missing keys.
        recipes: folder of YAML files that suit `--config`, each with a first line that says what it is for.
        default_files: YAML files that are read where `--config` names none.
    """

    script: str
    config: type[StrictConfig]
    about: str
    example: str
    recipes: Path | None = None
    default_files: tuple[Path, ...] = ()

    def parse(self, argv: Sequence[str] | None = None) -> Any:
        """The resolved config: YAML files (`--config`, later wins), then `--set`, then flags.

        Raises:
            ConfigError: an unknown flag or key, a value that does not fit, a required key that is missing.
            SystemExit: after `--help`.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        keys = {key.name: key for key in config_keys(self.config)}
        parser = self._parser(keys.values())
        known, unknown = parser.parse_known_args([_hyphened(word) for word in words])
        if unknown:
            raise ConfigError(self._unknown(unknown[0]))
        values = vars(known)
        files, sets = values.pop("--config"), values.pop("--set")
        overrides = {name: _parsed(keys[name], value) for name, value in values.items() if value is not _ABSENT}
        tree = resolve_tree(files or self.default_files, sets, overrides)
        missing = [key for key in keys.values() if _required(key) and key.name not in tree]
        if missing and not words:
            raise ConfigError(self._overview(missing))
        if missing:
            raise ConfigError(self._missing(missing))
        config = build_config(self.config, tree)
        self._refuse_lost_outputs(config, keys.values())
        return config

    def _refuse_lost_outputs(self, config: Any, keys: Iterable[Key]) -> None:
        """`ray job submit` runs a job in a copy of the submitted folder: what it writes there goes when Ray goes."""
        if PACKAGE_FOLDER not in Path.cwd().as_posix():
            return
        for key in keys:
            value = getattr(config, key.name, None) if key.extra("writes") else None
            if value and "://" not in str(value) and not Path(value).expanduser().is_absolute():
                raise ConfigError(
                    f"{_flag(key.name)} {value}: this job runs in a copy of the folder that was submitted, so a "
                    f"relative output would be lost with it; give the whole path, such as {_flag(key.name)} "
                    f"$PWD/{value} in the shell that submits, or s3://BUCKET/{value}"
                )

    def _parser(self, keys: Iterable[Key]) -> "_Parser":
        keys = list(keys)
        required = [f"{_flag(key.name)} {_metavar(key)}" for key in keys if _required(key)]
        parser = _Parser(
            prog=self.script,
            usage=" ".join(["python", self.script, *required, "[--config FILE] [--set A.B=C] [--FLAG VALUE ...]"]),
            description=self.about,
            epilog="".join([self._recipe_list(), f"example:\n  {self.example}"]),
            formatter_class=_Formatter,
            allow_abbrev=False,
            argument_default=_ABSENT,
        )
        general = parser.add_argument_group("where settings come from")
        general.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            dest="--config",
            help="YAML file with any of the keys below; repeatable, later wins",
        )
        general.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="A.B=C",
            dest="--set",
            help="one key, its value in YAML; repeatable",
        )
        suffixes = Counter(suffix for key in keys for suffix in _suffixes(key.name))
        taken = {key.name for key in keys}
        groups: dict[str, Any] = {}
        for key in sorted(keys, key=lambda key: (not _required(key), "." in key.name)):
            section = key.name.rpartition(".")[0]
            title = "required" if _required(key) else section or "options"
            if title not in groups:
                about = f"all of these are also called --{section}.NAME" if section else None
                groups[title] = parser.add_argument_group(title, about)
            group = groups[title]
            short = [name for name in _suffixes(key.name)[1:] if suffixes[name] == 1 and name not in taken]
            _add_flag(group, key, [_flag(name) for name in (key.name, *short)])
        return parser

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("--"):
            return f"unexpected argument {word!r}; every value follows its flag, for example: {self.example}"
        meant = meant_keys(self.config, flag.removeprefix("--").replace("-", "_"))
        hint = "; did you mean " + " or ".join(_flag(name) for name in meant[:3]) + "?" if meant else ""
        return f"unknown option {flag}{hint or f'; python {self.script} --help lists all of them'}"

    def _missing(self, missing: Sequence[Key]) -> str:
        named = [f"{_flag(key.name)} ({key.field.description})" for key in missing]
        return f"{self.script} needs {_and(named)}; for example: {self.example}"

    def _overview(self, missing: Sequence[Key]) -> str:
        return "\n".join([self._missing(missing), "", self.about.strip(), "", self._recipe_list()]).rstrip() + (
            f"\n\nAll settings: python {self.script} --help"
        )

    def _recipe_list(self) -> str:
        if self.recipes is None:
            return ""
        files = sorted(self.recipes.glob("*.yaml"))
        width = max((len(file.name) for file in files), default=0)
        lines = [f"  {file.name:<{width}}  {_first_comment(file)}" for file in files]
        return "\n".join([f"recipes for --config, in {_shown(self.recipes)}:", *lines]) + "\n\n" if lines else ""


def run_command(command: Command, work: Callable[[Any], object], argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do the work; the exit status, which is 0 unless the work returns another number."""
    status = work(command.parse(argv))
    return status if isinstance(status, int) else EXIT_OK


def run_job(main: Callable[[], int | None]) -> NoReturn:
    """Run a job's `main` and exit with 0 (done), 1 (failed) or 2 (bad usage or config).

    What a person can put right is one line, a fault of the program a traceback. `AUDIOMAE_TRACEBACK=1` always shows it.
    """
    try:
        sys.exit(main() or EXIT_OK)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said = line_of(error)
        if said is None or os.environ.get("AUDIOMAE_TRACEBACK"):
            raise
        print(said[0], file=sys.stderr)
        sys.exit(said[1])


def line_of(error: BaseException) -> tuple[str, int] | None:
    """What is printed of an error that a person can put right, and the exit status; None for any other.

    These are the product's own errors, those of files and of S3, also where a Ray task raised them.
    """
    inner = getattr(error, "cause", None)  # Ray wraps what a task raised, and adds its traceback to the text
    if isinstance(inner, Exception):
        error = inner
    if isinstance(error, AudioMAEError):
        kind = "config error" if isinstance(error, ConfigError) else "error"
        return f"{kind}: {error}", error.exit_status
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):  # of botocore, by way of s3fs
        from audiomae.s3 import ACCESS

        return f"error: S3: {error}; {ACCESS}", EXIT_FAILED
    if isinstance(error, OSError) or type(error).__module__.startswith("botocore."):
        return f"error: {error}", EXIT_FAILED
    return None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block runs, say on stderr what is being waited for: after three seconds, then every ten."""
    began = time.monotonic()
    with _reminding(lambda: _say(f"{what}: {_duration(time.monotonic() - began)} so far")):
        yield


@contextmanager
def _reminding(remind: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call `remind` from a thread of its own, after three seconds and then every ten."""
    stop = threading.Event()

    def watch() -> None:
        pause = SAID_AFTER_S
        while not stop.wait(pause):
            remind()
            pause = SAID_EVERY_S

    watcher = threading.Thread(target=watch, name="reminder", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A progress line on stderr with rate and ETA, printed at most every `every_s` seconds.

    As a context manager it also prints while nothing happens, and the closing line at the end.
    """

    def __init__(self, label: str, total: int | None, unit: str, every_s: float = 3.0) -> None:
        self.label, self.total, self.unit, self.every_s = label, total, unit, every_s
        self.done = 0
        self._started = self._printed = time.monotonic()
        self._reminder = _reminding(self._remind)

    def update(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if now - self._printed >= self.every_s:
            self._printed = now
            self._print(now, note)

    def close(self, note: str = "") -> None:
        """Print the final line."""
        self._print(time.monotonic(), note)

    def __enter__(self) -> "Progress":
        self._reminder.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._reminder.__exit__(None, None, None)
        self.close()

    def _remind(self) -> None:
        now = time.monotonic()
        if self.done and now - self._printed < SAID_EVERY_S:
            return
        self._printed = now
        self._print(now, "")

    def _print(self, now: float, note: str) -> None:
        elapsed = max(now - self._started, 1e-9)
        rate = self.done / elapsed
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f"/{self.total:,}"
        text += f" {self.unit}, {rate:,.1f} {self.unit}/s"
        if not self.done:
            text = text.rpartition(",")[0] + f", waiting for the first {self.unit}, {_duration(elapsed)}"
        elif self.total and rate > 0 and self.done < self.total:
            text += f", {_duration((self.total - self.done) / rate)} left"
        else:
            text += f", {_duration(elapsed)}"
        _say(text + (f", {note}" if note else ""))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m{seconds:02d}s"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows the shortest name of each flag; the longer ones are understood as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        flag = min(action.option_strings, key=len) if "." in action.dest else action.option_strings[0]
        return f"{flag} {self._format_args(action, action.dest.upper())}"


class _Parser(argparse.ArgumentParser):
    """argparse, but bad usage is the product's own error: one message, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _add_flag(group: Any, key: Key, flags: list[str]) -> None:
    allowed = _members(key.field.annotation)
    about = (key.field.description or "").replace("%", "%%")
    if not key.field.is_required() and "default:" not in about and key.default not in (None, (), {}, ""):
        about += f" (default: {_plain(key.default)})".replace("%", "%%")
    options: dict[str, Any] = {"dest": key.name, "help": about, "metavar": _metavar(key)}
    if bool in allowed:
        options |= {"nargs": "?", "const": True, "metavar": None if allowed == [bool] else _metavar(key)}
        options["metavar"] = options["metavar"] or "true|false"
        group.add_argument(
            *[flag.replace("--", "--no-", 1) for flag in flags],
            dest=key.name,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS,
        )
    elif any(_is_list(member) for member in allowed):
        options |= {"nargs": "*" if _choices_of(allowed) else "+", "action": _Extend}
    elif any(_is_mapping(member) for member in allowed):
        options |= {"nargs": "+", "action": _Extend}
    group.add_argument(*flags, *(key.extra("flags") or ()), **options)


class _Extend(argparse.Action):
    """Collects the values of a flag that may be given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, _ABSENT)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *values])


def _parsed(key: Key, value: Any) -> Any:
    """The value that the words after a flag stand for; text where the field wants text, else as YAML has it."""
    allowed = _members(key.field.annotation)
    if not isinstance(value, list):
        return _scalar(value, allowed)
    if any(_is_mapping(member) for member in allowed):
        tree: dict[str, Any] = {}
        for word in value:
            if word.lstrip().startswith("{") or "=" not in word:
                tree |= _mapping(key, _yaml(word))
                continue
            pieces = word.split(",")
            for piece in pieces if all("=" in piece for piece in pieces) else [word]:
                name, _, text = piece.partition("=")
                tree[name.strip()] = _yaml(text)
        return tree
    lists = [member for member in allowed if _is_list(member)]
    if not value:
        return _choices_of(allowed)  # the bare flag means all there are
    if len(value) == 1:
        parsed = _yaml(value[0])
        if isinstance(parsed, list) or (parsed is None and type(None) in allowed):
            return parsed
        fixed = all(Ellipsis not in get_args(member) for member in lists if get_origin(member) is tuple)
        if len(lists) < len([member for member in allowed if member is not type(None)]) or (fixed and lists):
            return _scalar(value[0], [member for member in allowed if not _is_list(member)] or [int])
    inner = [item for member in lists for item in get_args(member) if item is not Ellipsis]
    return [_scalar(word, [option for item in inner for option in _members(item)]) for word in value]


def _mapping(key: Key, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_flag(key.name)}: expected NAME=VALUE or a YAML mapping such as {{a: 1}}, got {value!r}")
    return value


def _scalar(word: Any, allowed: Sequence[Any]) -> Any:
    if not isinstance(word, str):
        return word
    if str in allowed:
        return None if word == "null" and type(None) in allowed else word
    return _yaml(word)


def _yaml(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _members(annotation: Any) -> list[Any]:
    """What a type may be: the members of a union, the type itself otherwise."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a Literal, or a list of one, can hold; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for item in get_args(annotation) if item is not Ellipsis for value in _choices(item))


def _choices_of(allowed: Sequence[Any]) -> list[Any]:
    return [value for member in allowed if _is_list(member) for value in _choices(member)]


def _metavar(key: Key) -> str:
    if given := key.extra("metavar"):
        return str(given)
    members = [member for member in _members(key.field.annotation) if member is not type(None)]
    choices = [str(value) for member in members for value in _choices(member)]
    if choices:
        return "|".join(choices)
    names = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
    member = members[0] if members else str
    if _is_mapping(member):
        return "NAME=VALUE"
    if _is_list(member):
        return next((names.get(item, "VALUE") for item in get_args(member)), "VALUE")
    return names.get(member, "VALUE")


def _required(key: Key) -> bool:
    return key.field.is_required() and "." not in key.name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _hyphened(word: str) -> str:
    """`--batch_size=4` -> `--batch-size=4`: both spellings are understood."""
    flag, sep, value = word.partition("=")
    return flag.replace("_", "-") + sep + value if flag.startswith("--") and " " not in flag else word


def _suffixes(name: str) -> list[str]:
    """`a.b.c` -> a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(_plain, value)) if isinstance(value, tuple | list) else str(value)


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _first_comment(file: Path) -> str:
    first = file.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _shown(folder: Path) -> str:
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
