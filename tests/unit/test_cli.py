from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from audiomae.cli import Command, Progress, run_job
from audiomae.config import StrictConfig, also_called, config_keys, output, shown_as
from audiomae.errors import ConfigError, IntegrityError, UserError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("unknown key 'x'"), 2, "config error: unknown key 'x'"),
        (UserError("no corpus"), 1, "error: no corpus"),
        (IntegrityError("bad sum"), 1, "error: bad sum"),
    ],
)
def test_errors_become_exit_codes(error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err.strip() == text


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_return_value_is_the_exit_code(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_job(lambda: returned)
    assert exit_.value.code == code


class Inner(StrictConfig):
    depth: int = Field(2, description="blocks")
    size: tuple[int, int] = Field((4, 16), description="patch")
    deep_rate: float = Field(0.1, description="rate")


class Other(StrictConfig):
    depth: int = Field(3, description="other blocks")
    where: dict[str, str | int | list[str | int]] = Field({}, description="column: value")


class Everything(StrictConfig):
    """Every kind of field that a job has."""

    corpus: str = Field(description="a folder", json_schema_extra=shown_as("SRC"))
    out: str = Field(description="another folder")
    model: Inner = Field(Inner(), description="the model")
    other: Other | None = Field(None, description="another one")
    seed: int = Field(0, description="of everything")
    limit: int | None = Field(None, ge=1, description="at most")
    name: str | None = Field(None, description="called")
    fast: bool = Field(False, description="50% faster")
    gpu: bool | Literal["auto"] = Field("auto", description="a GPU")
    num: int | tuple[int, int] = Field(2, description="workers")
    compare: tuple[str, ...] = Field((), description="others", json_schema_extra=shown_as("DIR", "--also"))
    baselines: tuple[Literal["a", "b"], ...] = Field((), description="which")
    rate: float = Field(1e-3, description="rate", json_schema_extra=also_called("learning_rate"))


COMMAND = Command("jobs/x.py", Everything, "Does things.", "python jobs/x.py --corpus c --out o")
NEEDED = ["--corpus", "c", "--out", "o"]


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--seed", "5"], "seed", 5),
        (["--seed=5"], "seed", 5),
        (["--model.depth", "4"], "model.depth", 4),
        (["--other.depth", "4"], "other.depth", 4),
        (["--size", "8", "16"], "model.size", (8, 16)),
        (["--model.size", "[8, 16]"], "model.size", (8, 16)),
        (["--deep-rate", "1e-3"], "model.deep_rate", 1e-3),
        (["--deep_rate", "-2"], "model.deep_rate", -2.0),
        (["--where", "fold=1", "label=[a, b]"], "other.where", {"fold": 1, "label": ["a", "b"]}),
        (["--where", "{fold: 1}"], "other.where", {"fold": 1}),
        (["--limit", "3"], "limit", 3),
        (["--limit", "null"], "limit", None),
        (["--name", "12"], "name", "12"),
        (["--name", "null"], "name", None),
        (["--name", "true"], "name", "true"),
        (["--fast"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--set", "fast=true", "--no-fast"], "fast", False),
        (["--gpu", "auto"], "gpu", "auto"),
        (["--no-gpu"], "gpu", False),
        (["--num", "3"], "num", 3),
        (["--num", "1", "4"], "num", (1, 4)),
        (["--compare", "a", "b"], "compare", ("a", "b")),
        (["--compare", "a", "--also", "1"], "compare", ("a", "1")),
        (["--baselines"], "baselines", ("a", "b")),
        (["--baselines", "b"], "baselines", ("b",)),
        (["--set", "seed=1", "--seed", "2"], "seed", 2),
    ],
)
def test_a_field_is_a_flag(words: list[str], key: str, value: object) -> None:
    found: object = COMMAND.parse([*NEEDED, *words])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "o"], ["jobs/x.py needs --corpus (a folder); for example: python jobs/x.py"]),
        (["--seed", "1"], ["needs --corpus (a folder) and --out (another folder)"]),
        ([*NEEDED, "--sede", "1"], ["unknown option --sede", "--seed"]),
        ([*NEEDED, "--dept", "1"], ["unknown option --dept", "--model.depth"]),
        ([*NEEDED, "--depth", "1"], ["unknown option --depth", "--model.depth", "--other.depth"]),
        ([*NEEDED, "--learning-rate", "1"], ["unknown option --learning-rate", "--rate"]),
        ([*NEEDED, "--set", "learning_rate=1"], ["learning_rate", "'rate'"]),
        ([*NEEDED, "stray"], ["unexpected argument 'stray'", "python jobs/x.py --corpus c"]),
        ([*NEEDED, "--seed", "abc"], ["'seed'", "integer", "abc"]),
        ([*NEEDED, "--limit", "0"], ["'limit'", "greater than or equal to 1"]),
        ([*NEEDED, "--baselines", "c"], ["baselines", "'a' or 'b'"]),
        ([*NEEDED, "--where", "fold"], ["--other.where", "NAME=VALUE"]),
        ([*NEEDED, "--seed"], ["--seed", "expected one argument"]),
    ],
)
def test_bad_usage_says_what_was_expected(words: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        COMMAND.parse(words)
    assert all(text in str(error.value) for text in said), str(error.value)


def test_help_shows_every_field_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMAND.parse(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for key in config_keys(Everything):
        name = key.name if key.last == "depth" else key.last  # two are called that
        assert str(key.field.description) in said and f"--{name.replace('_', '-')}" in said, key.name
    assert "python jobs/x.py --corpus c --out o" in said


def test_without_arguments_a_command_explains_itself(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("# For small corpora.\nseed: 4\n")
    command = Command("jobs/x.py", Everything, "Does things.", "python jobs/x.py --corpus c", recipes=tmp_path)
    with pytest.raises(ConfigError) as error:
        command.parse([])
    for text in ("--corpus", "--out", "Does things.", "small.yaml  For small corpora.", "python jobs/x.py --help"):
        assert text in str(error.value)
    files = command.parse([*NEEDED, "--config", str(tmp_path / "small.yaml")])
    assert files.seed == 4


def test_progress_gives_rate_and_eta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 110.0, 120.0])
    monkeypatch.setattr("audiomae.cli.time.monotonic", lambda: next(now))
    with Progress("embed", 200, "clips") as progress:
        progress.update(1)  # one second in: too early to print
        progress.update(99)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["embed: 100/200 clips, 10.0 clips/s, 10s left", "embed: 100/200 clips, 5.0 clips/s, 20s left"]


class Writes(StrictConfig):
    out: str = Field(description="a folder", json_schema_extra=output("DIR"))
    corpus: str = Field("clips", description="what is read")


@pytest.mark.parametrize(("out", "lost"), [("emb", True), ("./a/b", True), ("/data/emb", False), ("s3://b/emb", False)])
def test_a_submitted_job_refuses_outputs_that_would_be_lost(
    out: str, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command("jobs/x.py", Writes, "Writes.", "python jobs/x.py --out emb")
    assert command.parse(["--out", out]).out == out  # in a shell, relative to where it is
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    if not lost:
        assert command.parse(["--out", out]).out == out
        return
    with pytest.raises(ConfigError, match=r"--out .*would be lost.*\$PWD"):
        command.parse(["--out", out])
