import pytest

from rollout.episode import Episode, Status
from rollout.errors import UserError
from training.selection import All, DropOverlong, DynamicSampling


def group(*rewards, status=Status.FINISHED):
    return [Episode("p", "g", rewards={"task": reward}, status=status) for reward in rewards]


def test_dynamic_sampling_keeps_groups_with_a_gradient():
    selection = DynamicSampling(max_rounds=3)
    assert selection.max_rounds == 3
    assert selection.keep(group(0.0, 1.0, 0.0))
    assert not selection.keep(group(0.1, 0.1, 0.1))
    assert not selection.keep(group(1.0))
    assert selection.trains(group(1.0)[0])


def test_drop_overlong_refuses_only_truncated_episodes():
    selection = DropOverlong()
    assert selection.keep(group(0.0, 0.0))
    assert [status for status in Status if not selection.trains(group(0.0, status=status)[0])] == [Status.TRUNCATED]
    assert selection.max_rounds == 1


def test_all_keeps_everything():
    assert All().keep(group(0.0, 0.0))
    assert All().trains(group(0.0, status=Status.TRUNCATED)[0])
    assert All().max_rounds == 1


def test_no_rounds_are_refused():
    with pytest.raises(UserError, match=r"selection\.max_rounds"):
        DynamicSampling(max_rounds=0)
