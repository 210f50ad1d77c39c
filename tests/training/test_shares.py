"""Full tensors out of the workers' shares."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sid_ray.training.shares import consecutive
from tests.ranks import on_ranks


@pytest.mark.distributed
def test_few_collectives_give_what_deepspeed_gives(tiny_teacher):
    """Both ways of sharing and both precisions, on two ranks: bitwise, however the parameters are grouped."""
    on_ranks(2, "tests.shares_worker", str(tiny_teacher))


@given(st.lists(st.integers(1, 100)), st.integers(1, 150))
def test_groups_keep_the_order_and_the_limit(sizes, limit):
    named = {f"p{i}": size for i, size in enumerate(sizes)}
    groups = list(consecutive(named, limit))
    assert [name for group in groups for name in group] == list(named)
    for group in groups:
        assert len(group) == 1 or sum(named[name] for name in group) <= limit
    for group, following in pairwise(groups):
        assert sum(named[name] for name in [*group, following[0]]) > limit, "a group ended too early"
