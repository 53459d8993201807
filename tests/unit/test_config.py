from pathlib import Path

import pytest
import yaml

from audiomae.config import StrictConfig, dump_config, load_config
from audiomae.errors import ConfigError


class Inner(StrictConfig):
    depth: int = 2
    names: tuple[str, ...] = ()


class Outer(StrictConfig):
    model: Inner = Inner()
    seed: int = 0
    extra: dict[str, float] | None = None


def test_later_files_then_sets_then_flags_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nmodel: {depth: 3, names: [a]}\n")
    second.write_text("model: {depth: 4}\n")
    config = load_config(Outer, [first, second], ["seed=7", "extra.gain=0.5"], {"model.depth": 9, "model.names": None})
    assert config == Outer(seed=7, model=Inner(depth=9, names=("a",)), extra={"gain": 0.5})


def test_dump_reads_back(tmp_path: Path) -> None:
    config = Outer(seed=3, model=Inner(names=("x", "y")))
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config))
    assert load_config(Outer, [file]) == config
    assert yaml.safe_load(file.read_text())["model"]["depth"] == 2, "defaults are spelled out"


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["model.dept=4"], ["model.dept", "depth"]),
        (["sede=4"], ["sede", "seed"]),
        (["seed=abc"], ["seed", "integer", "abc"]),
        (["seed"], ["KEY=VALUE"]),
        (["seed=[1"], ["not valid YAML"]),
    ],
)
def test_a_bad_key_names_itself_and_its_nearest(sets: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Outer, [], sets)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("text", "word"), [("a: [", "not valid YAML"), ("- 1", "mapping")])
def test_a_bad_file_is_named(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_config(Outer, [file])
    with pytest.raises(ConfigError, match="No such file"):
        load_config(Outer, [tmp_path / "absent.yaml"])
