import pytest

from audiomae.cli import Progress, job_parser, run_job
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


def test_help_shows_the_example_and_unknown_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    parser = job_parser("Does things.", "python ray_jobs/x.py --config a.yaml")
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--help"])
    assert exit_.value.code == 0
    assert "python ray_jobs/x.py --config a.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--nonsense"])
    assert exit_.value.code == 2
    assert parser.parse_args(["--set", "a=1", "--set", "b=2"]).sets == ["a=1", "b=2"]


def test_progress_gives_rate_and_eta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 110.0, 120.0])
    monkeypatch.setattr("audiomae.cli.time.monotonic", lambda: next(now))
    with Progress("embed", 200, "clips") as progress:
        progress.update(1)  # one second in: too early to print
        progress.update(99)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["embed: 100/200 clips, 10.0 clips/s, 10s left", "embed: 100/200 clips, 5.0 clips/s, 20s left"]
