"""One thread or a team: both are measured, the faster one is taken, and a machine may change its mind."""

from collections import Counter

import pytest

from serve.teamwork import EVERY, MOST, REMEMBERED, TRIED, Teamwork


def taken(teamwork: Teamwork, seconds: dict[int, float], batches: int) -> Counter[int]:
    """How often each was chosen, by a machine where they take so long; the first after another way ten times that."""
    seen: Counter[int] = Counter()
    before = 0
    for _ in range(batches):
        threads = teamwork.choose()
        seen[threads] += 1
        teamwork.learn(threads, seconds[threads] * (1 if threads == before else 10))
        before = threads
    return seen


@pytest.mark.parametrize(("seconds", "faster"), [({1: 7.0, 2: 4.5}, 2), ({1: 17.0, 2: 40.0}, 1)])
def test_the_faster_one_is_taken_and_the_other_tried_again(seconds: dict[int, float], faster: int) -> None:
    teamwork = Teamwork(2)
    taken(teamwork, seconds, 2 * EVERY)
    assert taken(teamwork, seconds, 10 * EVERY) == {faster: 10 * (EVERY - TRIED), 3 - faster: 10 * TRIED}


def test_a_machine_that_gets_busy_is_noticed_and_one_that_gets_idle_again() -> None:
    teamwork = Teamwork(2)
    taken(teamwork, {1: 7.0, 2: 4.5}, 2 * EVERY)
    for seconds, faster in (({1: 10.0, 2: 30.0}, 1), ({1: 7.0, 2: 4.5}, 2)):
        taken(teamwork, seconds, 2 * EVERY)
        assert taken(teamwork, seconds, EVERY)[faster] == EVERY - TRIED


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 2), (64, MOST)])
def test_a_team_is_no_larger_than_its_cores(cores: int, most: int) -> None:
    seen = taken(Teamwork(cores), dict.fromkeys(range(1, 65), 1.0), 3 * REMEMBERED)
    assert set(seen) == {1, most}
