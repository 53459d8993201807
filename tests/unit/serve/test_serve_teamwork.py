"""One thread or a team: both are measured, the faster one is taken, and a machine may change its mind."""

from collections import Counter

import pytest

from serve.teamwork import COMPARISONS, EVERY, MOST, TRIED, Teamwork

LEARNT = 2 * TRIED * COMPARISONS  # batches until all comparisons were made once
MIND = COMPARISONS // 2 + 1  # comparisons that change it


def taken(teamwork: Teamwork, seconds: dict[int, float], batches: int, slowing: float = 1.0) -> Counter[int]:
    """How often each was chosen, by a machine where they take so long; the first after another way ten times that.

    The machine takes `slowing` times as long for each batch as for the one before it.
    """
    seen: Counter[int] = Counter()
    before = 0
    for batch in range(batches):
        threads = teamwork.choose()
        seen[threads] += 1
        teamwork.learn(threads, seconds[threads] * slowing**batch * (1 if threads == before else 10))
        before = threads
    return seen


@pytest.mark.parametrize(("seconds", "faster"), [({1: 7.0, 2: 4.5}, 2), ({1: 17.0, 2: 40.0}, 1)])
def test_the_faster_one_is_taken_and_the_other_tried_again(seconds: dict[int, float], faster: int) -> None:
    teamwork = Teamwork(2)
    taken(teamwork, seconds, LEARNT)
    assert taken(teamwork, seconds, 10 * EVERY) == {faster: 10 * (EVERY - TRIED), 3 - faster: 10 * TRIED}


def test_a_machine_that_gets_busy_is_noticed_and_one_that_gets_idle_again() -> None:
    teamwork = Teamwork(2)
    taken(teamwork, {1: 7.0, 2: 4.5}, LEARNT)
    for seconds, faster in (({1: 10.0, 2: 30.0}, 1), ({1: 7.0, 2: 4.5}, 2)):
        taken(teamwork, seconds, MIND * EVERY)
        assert taken(teamwork, seconds, EVERY)[faster] == EVERY - TRIED


@pytest.mark.parametrize("slowing", [0.98, 1.02])
@pytest.mark.parametrize(("seconds", "faster"), [({1: 7.0, 2: 6.0}, 2), ({1: 7.0, 2: 8.0}, 1)])
def test_a_machine_that_gets_slower_or_faster_all_the_time_is_no_other_machine(
    seconds: dict[int, float], faster: int, slowing: float
) -> None:
    teamwork = Teamwork(2)
    taken(teamwork, seconds, LEARNT, slowing)
    assert taken(teamwork, seconds, 5 * EVERY, slowing)[faster] == 5 * (EVERY - TRIED)


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 2), (64, MOST)])
def test_a_team_is_no_larger_than_its_cores(cores: int, most: int) -> None:
    seen = taken(Teamwork(cores), dict.fromkeys(range(1, 65), 1.0), LEARNT)
    assert set(seen) == {1, most}
