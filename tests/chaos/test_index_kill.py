"""Builds of an index killed with SIGKILL between any two of their effects, and builds at once, on disk and on S3."""

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from embedding_sets import clusters, make_set
from index_builds import Build, Ended, content, left_over

from audiomae import AudioIndex, storage
from audiomae.artifacts import releases

ROWS, DIM = 900, 16
SETTINGS = ["--recall", "0", "--set", "flat_max_rows=100", "--set", "map=false", "--set", "queries=20"]
SETTINGS += ["--set", "filter_queries=0"]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two embedding sets, the second far smaller: a first build, and one that extends it."""
    home = tmp_path_factory.mktemp("sets")
    make_set(home / "a", clusters(ROWS, DIM))
    make_set(home / "b", clusters(60, DIM, seed=1), names=[f"b{n}.wav" for n in range(60)])
    return [str(home / "a"), str(home / "b")]


class Chaos:
    """One command line, launched and killed until it is through, again and again into new places."""

    def __init__(self, embeddings: list[str], home: Path, root: str, seed: int) -> None:
        self._embeddings, self._home, self._root, self._rng = embeddings, home, root, random.Random(seed)
        whole = self._build("whole")
        self._effects = 0
        for sets in (1, 2):
            ended = whole(sets).run()
            assert ended.status == 0, ended.printed
            self._effects = max(self._effects, ended.effects)
        self._expected = content(f"{root}/whole")
        assert any(name.startswith("segments/") for name in self._expected) and not left_over_old(f"{root}/whole")

    def _build(self, name: str) -> Callable[[int], Build]:
        def build(sets: int) -> Build:
            log = self._home / f"{name}.log"
            return Build(f"{self._root}/{name}", self._embeddings[:sets], log, SETTINGS)

        return build

    def kill(self, times: int) -> int:
        """Kill so often; how many builds got through meanwhile, each of which was found equal to the undisturbed."""
        killed, finished, name = 0, 0, "0"
        while killed < times:
            sets = 1
            while sets <= 2:
                moment = self._rng.randrange(1, self._effects) if killed < times else None
                ended = self._build(name)(sets).run(moment)
                if ended.status == -9:
                    killed += 1
                else:
                    assert ended.status == 0, ended.printed
                    sets += 1
            self._check(f"{self._root}/{name}")
            finished += 1
            name = str(finished)
        return finished

    def _check(self, index: str) -> None:
        found = content(index)
        assert found.keys() == self._expected.keys()
        assert [name for name, data in found.items() if data != self._expected[name]] == []
        assert left_over_old(index) == set()
        assert len(AudioIndex.open(index)) == ROWS + 60


def left_over_old(index: str) -> set[str]:
    """What is left over beside the first version, which is kept."""
    return {name for name in left_over(index) if not name.startswith(f"{first_version(index)}/")}


def first_version(index: str) -> str:
    """The name of the first version that was in force."""
    return str(releases.history(index).read(1)["version"])


def test_three_kills_leave_no_trace(embeddings: list[str], tmp_path: Path) -> None:
    assert Chaos(embeddings, tmp_path, str(tmp_path / "indexes"), seed=5).kill(3) >= 1


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder, or a bucket with a download cache of its own."""
    monkeypatch.setenv("AUDIOMAE_CACHE", str(tmp_path / "cache"))
    return str(tmp_path) if request.param == "disk" else s3_bucket


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_leave_no_trace(embeddings: list[str], tmp_path: Path, place: str) -> None:
    assert Chaos(embeddings, tmp_path, f"{place}/indexes", seed=2026).kill(20) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_of_eight_builds_at_once_one_wins(embeddings: list[str], tmp_path: Path, place: str) -> None:
    index = f"{place}/index"
    sets = []
    for number in range(8):
        make_set(
            tmp_path / f"s{number}", clusters(80, DIM, seed=number), names=[f"{number}-{n}.wav" for n in range(80)]
        )
        sets.append(str(tmp_path / f"s{number}"))
    barrier = multiprocessing.get_context("forkserver").Barrier(8)
    logs = [tmp_path / f"{number}.log" for number in range(8)]
    running = [Build(index, [path], log, SETTINGS).start(barrier=barrier) for path, log in zip(sets, logs, strict=True)]
    ended: list[Ended] = [one.wait() for one in running]
    assert not any("Traceback" in one.printed for one in ended), [one.printed for one in ended]
    won = [number for number, one in enumerate(ended) if one.status == 0]
    lost = [one for one in ended if one.status != 0]
    assert won and all(one.status == 1 and "another version was put in force" in one.printed for one in lost)
    # who started after another had published extends it: each version holds what the one before it held, and one set
    assert len(releases.history(index).numbers()) == len(won)
    assert len(AudioIndex.open(index)) == 80 * len(won)
    releases.gc(index, keep=1)
    assert left_over(index) == set()
    assert not [name for name in storage.list_names(index) if name.startswith(".")]
