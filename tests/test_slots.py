"""Where visits stand: the reference of the kernels that sort them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids.experts.slots import align


def test_by_hand():
    # token 0 goes to experts 2 and 0, token 1 to 2 and 3; tiles of 2
    slots = align(torch.tensor([[2, 0], [2, 3]]), experts=4, size=2)
    assert slots.start.tolist() == [0, 2, 2, 4, 6]  # expert 1 owns nothing
    assert slots.visit.tolist() == [1, 4, 0, 2, 3, 4, 4, 4]  # 4: empty
    assert slots.place.tolist() == [[2, 0], [3, 4]]
    assert slots.expert.tolist() == [0, 2, 3, -1]


@given(st.data(), st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, 4, 16]))
def test_each_visit_has_one_slot_of_its_expert(data, tokens, experts, size):
    k = data.draw(st.integers(1, experts))
    one = st.permutations(range(experts)).map(lambda order: order[:k])
    ids = torch.tensor(data.draw(st.lists(one, min_size=tokens, max_size=tokens)))
    ids = ids.reshape(tokens, k).long()
    slots = align(ids, experts, size)
    start, expert = slots.start.tolist(), slots.expert.tolist()
    assert slots.visit.shape[0] == size * len(expert) >= start[-1]
    for visit, slot in enumerate(slots.place.flatten().tolist()):
        e = int(ids.flatten()[visit])
        assert slots.visit[slot] == visit
        assert start[e] <= slot < start[e + 1]
        assert expert[slot // size] == e
    for e in range(experts):
        load, held = int((ids == e).sum()), slots.visit[start[e] : start[e + 1]].tolist()
        assert held == sorted(held)
        assert start[e] % size == 0
        assert load <= len(held) < load + size
        assert held.count(tokens * k) == len(held) - load
    assert (slots.expert == -1).tolist() == [
        tile * size >= start[-1] for tile in range(len(expert))
    ]


def test_all_to_one_expert_fit():
    slots = align(torch.full((5, 1), 1), experts=3, size=4)
    assert slots.start.tolist() == [0, 0, 8, 8]


@pytest.mark.parametrize("size", [16, 128])
def test_the_bound_is_met_where_every_expert_has_one_token(size):
    slots = align(torch.arange(6)[:, None], experts=6, size=size)
    assert slots.start[-1] == len(slots.visit) == 6 * size
