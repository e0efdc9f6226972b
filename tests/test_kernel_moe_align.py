"""Alignment of visits: equal to minids.experts.slots, in every load, and the same in each run."""

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_experts import LOADS, draw_ids, slots_by_loop
from kernel_inputs import assert_caught, bitwise_equal, is_written, laid_out, poisoned_memory
from minids_kernels import moe_align
from minids_kernels.cards import Card
from minids_kernels.moe_align import SIZES, align, size_for
from minids_kernels.slots import Slots, n_slots

from minids.experts import slots as reference

pytestmark = pytest.mark.usefixtures("interpreter")

# tokens, experts, K: one token, K = E, several stretches
SHAPES = [(1, 1, 1), (1, 256, 8), (5, 4, 2), (9, 3, 3), (43, 16, 6)]


def aligned(ids, experts: int, size: int, module=moe_align) -> Slots:
    """Align in memory that was full of other numbers, all of which must be written."""
    with poisoned_memory():
        found = module.align(ids, experts, size)
    assert all(is_written(part) for part in found[:4])
    return found


def assert_same(found, wanted) -> None:
    for name, x, y in zip(Slots._fields, found, wanted, strict=True):
        assert x == y if name == "size" else torch.equal(x, y), name


def test_example_by_hand(device):
    """Expert 2 is visited first and last, expert 0 by token 1, expert 1 by nobody."""
    found = aligned(torch.tensor([[2], [0], [2]], device=device), 3, 16)
    assert found.place.tolist() == [[16], [0], [17]]
    assert found.start.tolist() == [0, 16, 16, 32]
    assert found.expert.tolist() == [0, 2, -1]
    assert len(found.visit) == n_slots(3, 3, 16) == 48
    assert found.visit.tolist() == [1, *[3] * 15, 0, 2, *[3] * 30]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_equals_reference(load, shape, size, device):
    tokens, experts, k = shape
    ids = draw_ids(load, tokens, experts, k, device)
    assert_same(aligned(ids, experts, size), reference.align(ids, experts, size))


@pytest.mark.parametrize("load", LOADS)
def test_equals_a_loop(load, device):
    ids = draw_ids(load, 70, 12, 4, device)
    assert_same(aligned(ids, 12, 16), slots_by_loop(ids, 12, 16))


@pytest.mark.parametrize("load", ["any", "all to one"])
def test_three_launches(load, device):
    """2,100 visits; the counts of nine stretches are added up."""
    ids = draw_ids(load, 700, 6, 3, device)
    assert_same(aligned(ids, 6, 128), reference.align(ids, 6, 128))


@settings(max_examples=10)
@given(st.integers(1, 100), st.integers(1, 30), st.booleans(), st.data())
def test_random_shapes(device, tokens, experts, one_launch, data):
    k, size = data.draw(st.integers(1, min(experts, 6))), data.draw(st.sampled_from(SIZES))
    ids = draw_ids(data.draw(st.sampled_from(sorted(LOADS))), tokens, experts, k, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_align, "_IN_ONE_LAUNCH", 2048 if one_launch else 0)
        found = aligned(ids, experts, size)
    assert_same(found, reference.align(ids, experts, size))


def test_most_experts_and_all_of_them(device):
    ids = draw_ids("any", 1, 512, 512, device)
    assert_same(aligned(ids, 512, 16), reference.align(ids, 512, 16))


@pytest.mark.parametrize("layout", ["transposed", "rows 3 apart", "every second column"])
def test_any_layout_and_both_integers(layout, device):
    ids = draw_ids("any", 33, 8, 4, device)
    wanted = reference.align(ids, 8, 16)
    assert_same(aligned(laid_out(ids, layout), 8, 16), wanted)
    assert_same(aligned(laid_out(ids.int(), layout), 8, 16), wanted)


def test_without_tokens(device):
    found = aligned(torch.empty((0, 2), dtype=torch.int64, device=device), 4, 16)
    assert_same(found, reference.align(found.place.long(), 4, 16))


@pytest.mark.parametrize("most", [0, 2048])
def test_two_runs_are_equal(most, device, monkeypatch):
    monkeypatch.setattr(moe_align, "_IN_ONE_LAUNCH", most)
    ids = draw_ids("any", 40, 16, 8, device)
    bitwise_equal(lambda: align(ids, 16, 16))


def test_sums_of_more_than_one_step(device):
    """The second launch adds up 128 stretches at a time."""
    stretches = 130
    counts = torch.randint(0, 9, (stretches, 3), dtype=torch.int32).to(device)
    before, loads = counts.clone(), torch.empty(3, dtype=torch.int32, device=device)
    moe_align._add_up[(1,)](before, loads, stretches, 3, 8, 128)
    assert torch.equal(loads, counts.sum(0).int())
    assert torch.equal(before, (counts.cumsum(0) - counts).int())


@pytest.mark.parametrize(
    ("ids", "experts", "size", "words"),
    [
        (torch.zeros(3, 2), 4, 16, "ids must be .* int64 or int32, got"),
        (torch.zeros(3, dtype=torch.int64), 4, 16, "ids must be"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, 16, "experts must be 1 to 512, got 0"),
        (torch.zeros(3, 2, dtype=torch.int64), 513, 16, "experts must be 1 to 512, got 513"),
        (torch.zeros(3, 2, dtype=torch.int64), 4, 32, "size must be one of .* got 32"),
        (torch.zeros(1, 1, dtype=torch.int64).expand(2**28, 8), 4, 16, "slots must fit in int32"),
    ],
)
def test_errors_name_the_value(ids, experts, size, words, device):
    with pytest.raises(ValueError, match="align: " + words):
        align(ids.to(device) if ids.numel() < 99 else ids, experts, size)


def test_size_by_hand():
    model = CARDS[HOPPER]
    card = Card(model.name, HOPPER, model.n_sm, model.shared_bytes)
    sizes = [size_for(tokens, 8, 256, False, card) for tokens in (1, 256, 257, 8191, 8192)]
    assert sizes == [16, 16, 64, 64, 128]
    assert size_for(1, 8, 256, True, card) == 128
    assert size_for(1, 8, 256, False, card._replace(capability=(8, 0))) == 64


def check(module) -> None:
    most = module._IN_ONE_LAUNCH
    for tokens, experts, k, size, few in [(43, 16, 7, 16, True), (150, 6, 3, 128, False)]:
        ids = draw_ids("few of many", tokens, experts, k)
        module._IN_ONE_LAUNCH = most if few else 0
        with poisoned_memory():
            found = module.align(ids, experts, size)
        module._IN_ONE_LAUNCH = most
        assert_same(found, reference.align(ids, experts, size))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v[:, None] > others_v", "v[:, None] >= others_v"),
        ("tl.where(other < stretch", "tl.where(other <= stretch"),
        ("(load + SIZE - 1) // SIZE", "(load + SIZE) // SIZE"),
        ("end[None, :] <= (tile", "end[None, :] < (tile"),
        ("whose, -1)", "whose, 0)"),
        ("first + load, tl.maximum", "end, tl.maximum"),
        ("tl.load(loads + e, mask=e < E", "tl.load(loads + e, mask=e < E - 1"),
        ("tl.cumsum(found, axis=0) - found", "tl.cumsum(found, axis=0)"),
        ("(v % K).to(tl.int64) * ids_k", "(v % 2).to(tl.int64) * ids_k"),
    ],
)
def test_planted_bug_is_seen(old, new, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    assert_caught(moe_align, check, old, new)


# Ring 2: what the compiler makes of it


def launch(tokens: int, k: int, experts: int, size: int) -> None:
    align(torch.empty(tokens, k, dtype=torch.int64, device="meta"), experts, size)


CALLS = [
    {"tokens": 32, "k": 8, "experts": 256, "size": 16},
    {"tokens": 8192, "k": 8, "experts": 256, "size": 128},
    {"tokens": 8192, "k": 6, "experts": 512, "size": 64},
]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_hopper_spills_nothing(n):
    one, *three = compile_calls("test_kernel_moe_align", "launch", CALLS[:n])
    assert [kernel.kernel for kernel in one] == ["_give_out"]
    for launches in three:
        assert [kernel.kernel for kernel in launches] == ["_count", "_add_up", "_give_out"]
    for kernel in (kernel for launches in (one, *three) for kernel in launches):
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.programs_on_an_sm >= 3, kernel


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    calls = compile_calls("test_kernel_moe_align", "launch", CALLS[:2], capability)
    assert all(kernel.spilled_bytes == 0 for launches in calls for kernel in launches)


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("size", SIZES)
def test_v3_on_a_card(load, size):
    for tokens in (1, 7, 128, 256, 257, 4096, 8192, 32768):
        ids = draw_ids(load, tokens, 256, 8, "cuda")
        assert_same(aligned(ids, 256, size), reference.align(ids, 256, size))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 4096])
def test_graph_is_captured_and_replayed_with_other_ids(tokens):
    ids, other = (draw_ids(load, tokens, 256, 8, "cuda") for load in ("any", "all to one"))
    align(ids, 256, 64)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = align(ids, 256, 64)
    ids.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, reference.align(other, 256, 64))
