"""Arguments, filters and vectors of the service, and its config file."""

import re
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from audiomae.config import build_config
from audiomae.errors import ConfigError
from serve.app import build
from serve.arguments import ServeArgs
from serve.problems import Problem
from serve.queries import check_filter, check_vectors
from serve.versions import VersionCache

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "serve" / "config.yaml"
COLUMNS = ("id", "uri", "label", "fold")


def test_arguments_from_the_command_line_are_text() -> None:
    args = build_config(ServeArgs, {"index": "somewhere", "port": "8001", "max_upload_mib": "0.5"})
    assert (args.port, args.max_upload_mib, args.host) == (8001, 0.5, "127.0.0.1")


def test_an_unknown_argument_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"'max_uplod_mib'; did you mean 'max_upload_mib'"):
        build_config(ServeArgs, {"index": "somewhere", "max_uplod_mib": 3})


@pytest.mark.parametrize("args", [{}, {"index": ""}, {"index": "x", "port": "0"}, {"index": "x", "prot": "8001"}])
def test_bad_arguments_end_the_builder_as_a_usage_error(args: dict[str, str]) -> None:
    with pytest.raises(click.UsageError, match=r"index|port") as caught:
        build(args)
    assert caught.value.exit_code == 2


def test_a_missing_index_ends_the_builder_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"build_index\.py") as caught:
        build({"index": str(tmp_path)})
    assert caught.value.exit_code == 1


def test_config_yaml_is_what_serve_deploy_accepts() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    build_config(ServeArgs, application.args)
    assert {deployment.name for deployment in application.deployments} == {"Api", "Encoder"}


def test_filters_come_as_text_or_object() -> None:
    wanted = {"label": "rain", "fold": {"gte": 2}}
    assert check_filter('{"label": "rain", "fold": {"gte": 2}}', COLUMNS) == wanted
    assert check_filter(wanted, COLUMNS) == wanted
    assert check_filter(None, COLUMNS) is check_filter("", COLUMNS) is check_filter({}, COLUMNS) is None


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("{label: rain}", "bad_filter", "not JSON"),
        ("[1]", "bad_filter", "a list"),
        ("[" * 100_000, "bad_filter", "not JSON"),
        ({"lable": "rain"}, "unknown_column", "did you mean 'label'"),
        ({"zzz": 1}, "unknown_column", "valid names: fold, id, label, uri"),
    ],
)
def test_bad_filters_are_refused(given: str | dict[str, object], code: str, message: str) -> None:
    with pytest.raises(Problem, match=re.escape(message)) as caught:
        check_filter(given, COLUMNS)
    assert (caught.value.status_code, caught.value.code) == (422, code)


def test_vectors_become_unit_length() -> None:
    queries = check_vectors([[3, 4, 0], [0, 0, 1e-200]], dim=3, limit=2)
    assert queries.dtype == np.float32
    np.testing.assert_allclose(queries, [[0.6, 0.8, 0], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "code"),
    [
        ([[1.0, 2.0]], "vector_dim_mismatch"),
        ([[1.0, 0.0, 0.0], [1.0]], "vector_dim_mismatch"),
        ([[0.0, 0.0, 0.0]], "zero_vector"),
        ([[1.0, 0.0, 0.0]] * 3, "too_many_vectors"),
        ([[1.0, float("inf"), 0.0]], "invalid_request"),
        ([[1.0, True, 0.0]], "invalid_request"),
        ([[1.0, "2", 0.0]], "invalid_request"),
        ([[1, 10**400, 0]], "invalid_request"),
        (["abc"], "invalid_request"),
        ({}, "invalid_request"),
        ([], "invalid_request"),
    ],
)
def test_bad_vectors_are_refused(vectors: object, code: str) -> None:
    with pytest.raises(Problem) as caught:
        check_vectors(vectors, dim=3, limit=2)
    assert (caught.value.status_code, caught.value.code) == (422, code)


def test_two_versions_are_kept_and_a_failed_opening_changes_nothing() -> None:
    opened: list[str] = []

    def opener(version: str) -> str:
        if version == "bad":
            raise ValueError(version)
        opened.append(version)
        return version.upper()

    cache = VersionCache(opener)
    assert [cache.get(version) for version in ("a", "b", "a", "b")] == ["A", "B", "A", "B"]
    with pytest.raises(ValueError, match="bad"):
        cache.get("bad")
    assert opened == ["a", "b"]
    assert [cache.get(version) for version in ("c", "b", "a")] == ["C", "B", "A"]
    assert opened == ["a", "b", "c", "a"]
