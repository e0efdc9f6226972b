"""Attention over expanded keys: equal to minids.mla.attend_expanded, whatever it is cut into."""

import math
import operator
from contextlib import contextmanager

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import (
    GRADIENT,
    HEADS,
    LENGTHS,
    LSE,
    WIDTHS,
    Expanded,
    draw_expanded,
    error,
    exact_expanded,
    tile_loads,
    tolerance,
)
from kernel_inputs import (
    LAYOUTS,
    bitwise_equal,
    gradients,
    is_written,
    laid_out,
    mutated,
    poison,
    poisoned_memory,
)
from minids_kernels import cards, configs, mla_prefill, softmax
from minids_kernels.cards import Card
from minids_kernels.latent import Causal, spans
from minids_kernels.mla_prefill import (
    CANDIDATES,
    DTYPES,
    Tile,
    attend_expanded,
    rule_of_thumb,
    schedule,
    traffic,
)

from minids import attention, mla

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "mla_prefill.Tile"
SCALE = 0.1
PUBLISHED = (128, 64, 128)
SMALL = (16, 16, 16)
TILES = CANDIDATES[:-1]  # the last one is FP32's


@contextmanager
def using(tile: Tile | None):
    """Let launches cut scores so; None: as the kernel chooses."""
    if tile is None:
        yield
        return
    with configs.trying(KERNEL, tile._asdict()) as trial:
        yield
    assert trial.asked, "nothing was launched"


def run(x: Expanded, mask, tile: Tile | None = None, scale=SCALE, module=mla_prefill):
    """Return output and log-sum-exp out of memory that was full of NaN, all of it written."""
    with using(tile), poisoned_memory():
        o, lse = module.forward(*x, mask, scale, cards.card("a test", *x))
    assert is_written(o), "a number of the output was not written"
    assert is_written(lse), "a number of log-sum-exp was not written"
    return o, lse


def assert_exact(x: Expanded, mask, tile: Tile | None = None, scale=SCALE, module=mla_prefill):
    """Compare with loops in FP64; a query that sees nothing gets 0 and -inf."""
    o, lse = run(x, mask, tile, scale, module)
    wanted, of_rows = exact_expanded(x, mask, scale)
    blind = of_rows == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, blind)
    assert not o.cpu()[blind.transpose(1, 2)].any()
    assert error(o, wanted.masked_fill(blind.transpose(1, 2)[..., None], 0)) < tolerance(o.dtype)
    gap = (lse.cpu() - of_rows).abs() / (1 + of_rows.abs())
    assert gap[~blind].numel() == 0 or gap[~blind].max() < LSE


def causal(device, *starts: int, documents=None) -> Causal:
    start = torch.tensor(starts, dtype=torch.int64, device=device)
    if documents is not None:
        documents = torch.tensor(documents, device=device)
    return Causal(start, documents)


def some_documents(batch: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Return numbers of documents, each in one stretch, then some tokens of all of them mixed."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(0, 5, (batch, tokens), generator=generator).sort(dim=1).values
    number[:, -tokens // 5 :] = torch.randint(0, 5, (tokens // 5 + 1,), generator=generator)[
        : number[:, -tokens // 5 :].shape[1]
    ]
    return (number * -(2**40) + 3).tolist()


# Ring 1: equal to the equations, and to the reference


def test_example_by_hand(device):
    """Keys of zeros weigh alike: a token's result is the mean of the values up to its own."""
    zeros = torch.zeros(1, 3, 1, 2, device=device)
    v = torch.tensor([[[[6.0]], [[2.0]], [[1.0]]]], device=device)
    x = Expanded(zeros, zeros, zeros, zeros[:, :, 0], v)
    o, lse = run(x, causal(device, 0))
    assert o.flatten().tolist() == [6, 4, 3]
    assert torch.allclose(lse.flatten().cpu(), torch.tensor([1.0, 2.0, 3.0]).log(), atol=1e-6)
    assert torch.equal(attend_expanded(*x, None, 1.0).flatten().cpu(), torch.full((3,), 3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_width_and_dtype(widths, dtype, device):
    x = draw_expanded(2, 37, 37, 2, widths, dtype, device)
    assert_exact(x, causal(device, 0, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 130), (65, 200), (33, 1)])
def test_equals_reference(queries, keys, dtype, device):
    if dtype == torch.float32:  # its tiles are small: as many of them
        queries, keys = -(-queries // 3), -(-keys // 3)
    x = draw_expanded(2, queries, keys, 2, (24, 8, 40), dtype, device)
    wide = [part.double() for part in x]
    theirs = attention.Causal(causal(device, max(keys - queries, 0), (keys - 1) // 2).start)
    for mask in (None, theirs):
        wanted = mla.attend_expanded(*wide, mask, SCALE)
        y = attend_expanded(*x, mask, SCALE)
        assert y.dtype == dtype
        assert y.shape == (2, queries, 2, 40)
        assert error(y, wanted) < tolerance(dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_every_number_of_heads(heads, device):
    assert_exact(draw_expanded(1, 5, 5, heads, SMALL, torch.bfloat16, device), causal(device, 0))


def leftovers(x: Expanded, mask: Causal) -> Expanded:
    """Put NaN into every slot that no query of its row sees."""
    k_nope, k_rope, v = (part.clone() for part in x[2:])
    for row, start in enumerate(mask.start.tolist()):
        for part in (k_nope, k_rope, v):
            poison(part[row, max(0, start + x.q_nope.shape[1]) :])
    return Expanded(x.q_nope, x.q_rope, k_nope, k_rope, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_every_length_among_nan(dtype, device):
    """A cache of rows with 0 to 4096 tokens, then three new ones, then NaN."""
    starts = LENGTHS if dtype != torch.float32 else LENGTHS[:-1]
    x = draw_expanded(len(starts), 3, max(starts) + 5, 1, SMALL, dtype, device)
    mask = causal(device, *starts)
    assert_exact(leftovers(x, mask), mask)


@pytest.mark.parametrize("tokens", [n for n in LENGTHS if n < 100])
def test_short_rows(tokens, device):
    x = draw_expanded(2, tokens, max(tokens, 1), 2, SMALL, torch.bfloat16, device)
    y = attend_expanded(*x, causal(device, 0, 0), SCALE)
    assert y.shape == (2, tokens, 2, 16)
    if tokens:
        assert_exact(x, causal(device, 0, 0))


@pytest.mark.parametrize("shape", [(0, 3, 3, 2), (2, 3, 3, 0), (0, 0, 3, 0)], ids=str)
def test_nothing_to_do(shape, device):
    batch, queries, keys, heads = shape
    x = draw_expanded(batch, queries, keys, heads, SMALL, device=device)
    y = attend_expanded(*x, causal(device, *[0] * batch), SCALE)
    assert y.shape == (batch, queries, heads, 16)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "cached", "documents"])
def test_every_tile(kind, tile, device):
    """Tiles that all see, on the diagonal, at a row's end; the walk need not begin at key 0."""
    queries = 100 if kind in ("all", "cached") else 300
    x = draw_expanded(2, queries, 300, 1, SMALL, torch.bfloat16, device)
    mask = {
        "all": None,
        "causal": causal(device, 0, 0),
        "cached": causal(device, 41, 200),
        "documents": causal(device, 0, 0, documents=some_documents(2, 300)),
    }[kind]
    assert_exact(leftovers(x, mask) if kind == "cached" else x, mask, tile)


def test_query_that_sees_nothing_gets_zero(device):
    """A row that begins before its cache does: tokens at -4 to -1 see no key."""
    for tile in (None, *TILES):
        x = draw_expanded(3, 10, 10, 2, SMALL, torch.bfloat16, device)
        mask = causal(device, -4, -10, -(2**40))
        assert_exact(leftovers(x, mask), mask, tile)


def test_start_behind_the_last_key_sees_all(device):
    x = draw_expanded(2, 5, 70, 1, SMALL, torch.bfloat16, device)
    for dtype in (torch.int32, torch.int64):
        start = torch.tensor([70, torch.iinfo(dtype).max], dtype=dtype, device=device)
        assert torch.equal(run(x, Causal(start))[0], run(x, None)[0])


def test_starts_may_lie_apart(device):
    x = draw_expanded(3, 5, 40, 1, SMALL, torch.bfloat16, device)
    start = torch.tensor([7, -1, 30, -1, 0, -1], device=device)
    wanted = attend_expanded(*x, causal(device, 7, 30, 0), SCALE)
    assert torch.equal(attend_expanded(*x, Causal(start[::2]), SCALE), wanted)
    wanted = attend_expanded(*x, causal(device, 7, 7, 7), SCALE)
    assert torch.equal(attend_expanded(*x, Causal(start[:1].expand(3)), SCALE), wanted)


def test_scores_of_any_size(device):
    """Scores in the thousands: no weight overflows, the largest alone counts; and all alike."""
    x = draw_expanded(1, 40, 40, 1, SMALL, torch.float16, device)
    assert_exact(x, causal(device, 0), scale=1e-30)
    o, lse = run(x, causal(device, 0), scale=300.0)
    wanted, of_rows = exact_expanded(x, causal(device, 0), 300.0)
    assert error(o, wanted) < tolerance(torch.float16)
    assert of_rows.abs().max() > 3000
    assert error(lse, of_rows) < LSE


@settings(max_examples=10)
@given(
    st.integers(1, 150), st.integers(1, 200), st.integers(1, 2), st.sampled_from(TILES),
    st.tuples(*[st.integers(1, 40)] * 3), st.sampled_from(["all", "cached", "documents"]),
    st.integers(0, 9),
)  # fmt: skip
def test_random_shapes(device, queries, keys, heads, tile, widths, kind, seed):
    queries = keys if kind == "documents" else queries
    x = draw_expanded(2, queries, keys, heads, widths, torch.float16, device, seed)
    starts = (0, max(0, keys - queries + 1))
    mask = {
        "all": None,
        "cached": causal(device, *starts),
        "documents": causal(device, 0, 0, documents=some_documents(2, keys, seed)),
    }[kind]
    assert_exact(leftovers(x, mask) if kind == "cached" else x, mask, tile)


# Documents


def test_spans_by_hand():
    documents = torch.tensor([[7, 7, -1, 7, 2**40, -1], [0, 0, 0, 0, 0, 0]])
    first, last = spans(documents)
    assert first.tolist() == [[0, 0, 2, 0, 4, 2], [0] * 6]
    assert last.tolist() == [[3, 3, 5, 3, 4, 5], [5] * 6]
    assert first.dtype == last.dtype == torch.int32


@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), min_size=9, max_size=9),
             min_size=1, max_size=3)
)  # fmt: skip
def test_spans_equal_a_search(rows):
    first, last = spans(torch.tensor(rows))
    assert first.tolist() == [[row.index(number) for number in row] for row in rows]
    assert last.tolist() == [[8 - row[::-1].index(number) for number in row] for row in rows]


def test_documents_equal_reference(device):
    x = draw_expanded(2, 90, 90, 2, SMALL, torch.float32, device)
    mask = causal(device, 0, 0, documents=some_documents(2, 90))
    wide = (part.double() for part in x)
    wanted = mla.attend_expanded(*wide, attention.Causal(*mask), SCALE)
    assert error(attend_expanded(*x, mask, SCALE), wanted) < tolerance(torch.float32)


def test_document_does_not_feel_its_neighbours(device):
    """Bit by bit the same beside other documents, when it starts where a tile does."""
    x = draw_expanded(1, 192, 192, 1, SMALL, torch.bfloat16, device)
    mask = causal(device, 0, documents=[[4] * 64 + [9] * 128])
    o, lse = run(x, mask, Tile(64, 64, 4, 2))
    alone = Expanded(*(part[:, 64:] for part in x))
    o_alone, lse_alone = run(alone, causal(device, 0), Tile(64, 64, 4, 2))
    assert torch.equal(o[:, 64:], o_alone)
    assert torch.equal(lse[..., 64:], lse_alone)


# Memory, dtypes, repetition


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_strides_give_the_same_bits(layout, device):
    x = draw_expanded(2, 20, 20, 2, (24, 8, 40), torch.bfloat16, device)
    wanted = run(x, causal(device, 0, 0))[0]
    for place in range(5):
        odd = list(x)
        odd[place] = laid_out(odd[place], layout)
        assert torch.equal(run(Expanded(*odd), causal(device, 0, 0))[0], wanted)


def test_expanded_rows_are_copied(device):
    """A step of 0 between rows: one token's key stands for all."""
    x = draw_expanded(1, 20, 1, 2, SMALL, torch.bfloat16, device)
    wide = [part.expand(1, 20, *part.shape[2:]) for part in x[2:]]
    wanted = run(Expanded(*x[:2], *(part.contiguous() for part in wide)), None)[0]
    assert torch.equal(run(Expanded(*x[:2], *wide), None)[0], wanted)


def test_row_does_not_depend_on_its_batch(device):
    """Bit by bit: alone, and beside longer rows."""
    x = draw_expanded(3, 70, 130, 2, SMALL, torch.bfloat16, device)
    mask = causal(device, 0, 60, 3)
    o, lse = run(x, mask)
    for row in range(3):
        alone = Expanded(*(part[row : row + 1] for part in x))
        o_alone, lse_alone = run(alone, Causal(mask.start[row : row + 1]))
        assert torch.equal(o[row : row + 1], o_alone)
        assert torch.equal(lse[row : row + 1], lse_alone)


def test_two_runs_are_bitwise_equal(device):
    x = draw_expanded(2, 130, 130, 2, (24, 8, 40), torch.bfloat16, device)
    bitwise_equal(lambda: run(x, causal(device, 0, 0)))


def test_mixed_dtypes_meet_in_the_wider_one(device):
    x = draw_expanded(1, 9, 9, 2, SMALL, torch.bfloat16, device)
    mixed = x._replace(k_rope=x.k_rope.float())
    y = attend_expanded(*mixed, causal(device, 0), SCALE)
    wide = Expanded(*(part.float() for part in x))
    assert y.dtype == torch.float32
    assert torch.equal(y, attend_expanded(*wide, causal(device, 0), SCALE))
    mixed = x._replace(v=x.v.half())  # neither holds the other
    assert attend_expanded(*mixed, causal(device, 0), SCALE).dtype == torch.float32


def test_autocast_chooses_the_dtype(device, monkeypatch):
    x = draw_expanded(1, 9, 9, 2, SMALL, torch.float32, device)
    on = {"cuda": torch.float16}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind in on)
    monkeypatch.setattr(torch, "get_autocast_dtype", on.__getitem__)
    y = attend_expanded(*x, causal(device, 0), SCALE)
    monkeypatch.undo()
    narrow = Expanded(*(part.half() for part in x))
    assert y.dtype == torch.float16
    assert torch.equal(y, attend_expanded(*narrow, causal(device, 0), SCALE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {"q_nope": x.q_nope[0]}, "q_nope must have 4 axes"),
        (lambda x: {"v": x.v[..., :0]}, "v must have 4 axes, a width"),
        (lambda x: {"k_rope": x.k_rope.double()}, "k_rope must have 3.* torch.float64:.*cast"),
        (lambda x: {"k_nope": x.k_nope[:, :8]}, r"k_nope must be \(2, 9, 2, 16\) beside"),
        (lambda x: {"k_rope": x.k_rope[..., :8]}, r"k_rope must be \(2, 9, 16\)"),
        (lambda x: {part: getattr(x, part)[:, :0] for part in ("k_nope", "k_rope", "v")},
         "there must be a key, .* got S = 0"),
        (lambda x: {"mask": torch.ones(2, 9, 9).bool()}, "mask must be Causal or.*impl='torch'"),
        (lambda x: {"mask": Causal(torch.zeros(2))}, r"start must be \(2,\) in int32 .*cast"),
        (lambda x: {"mask": Causal(torch.tensor([0, 0, 0]))}, r"start must be \(2,\).*got \(3,\)"),
        (lambda x: {"mask": Causal(torch.tensor([0, 0]), torch.zeros(2, 8).int())},
         r"documents must be \(2, 9\)"),
        (lambda x: {"mask": Causal(torch.tensor([0, 0]), torch.zeros(2, 9).int()),
                    "q_nope": x.q_nope[:, :3], "q_rope": x.q_rope[:, :3]},
         "documents need as many queries as keys, got 3 and 9"),
        (lambda x: {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        (lambda x: {"scale": math.nan}, "scale must be positive and finite, got nan"),
        (lambda x: {part: getattr(x, part)[:, :1, :, :1].expand(70000, 1, 2, 1)
                    for part in ("q_nope", "q_rope", "k_nope", "v")}
         | {"k_rope": x.k_rope[:, :1, :1].expand(70000, 1, 1)}, ".* at most 65535 rows.*B = 70000"),
        (lambda x: {"v": torch.zeros(2, 9, 2, 40000)}, "widths .* need more shared memory than"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, words, device):
    x = draw_expanded(2, 9, 9, 2, SMALL, device=device)
    if "70000" in words:
        x = Expanded(*(part[:1] for part in x))
    changed = {"mask": None, "scale": SCALE, **x._asdict(), **change(x)}
    if changed["mask"] is not None and not isinstance(changed["mask"], torch.Tensor):
        changed["mask"] = Causal(*(part if part is None else part.to(device)
                                   for part in changed["mask"]))  # fmt: skip
    changed["v"] = changed["v"].to(device)
    with pytest.raises(ValueError, match=f"attend_expanded: {words}"):
        attend_expanded(**changed)


# Gradients: the kernels are tested in test_kernel_mla_prefill_backward.py, here their place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_reach_every_input(dtype, device):
    x = draw_expanded(2, 21, 21, 2, SMALL, dtype, device)
    mask = causal(device, 0, 0, documents=some_documents(2, 21))
    found = gradients(lambda *parts: attend_expanded(*parts, mask, SCALE), *x)
    theirs = attention.Causal(*mask)
    exact = gradients(lambda *parts: mla.attend_expanded(*parts, theirs, SCALE),
                      *(part.double() for part in x))  # fmt: skip
    for mine, wanted in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert error(mine, wanted) < GRADIENT[dtype]


def test_gradients_come_back_in_their_inputs_dtypes(device):
    x = draw_expanded(1, 5, 5, 1, SMALL, torch.bfloat16, device)
    dtypes = (*DTYPES, *DTYPES[:2])
    mixed = [part.to(dtype).requires_grad_() for part, dtype in zip(x, dtypes, strict=True)]
    attend_expanded(*mixed, causal(device, 0), SCALE).sum().backward()
    assert [part.grad.dtype for part in mixed] == [part.dtype for part in mixed]
    assert all(part.grad.isfinite().all() for part in mixed)


def test_no_graph_is_kept_where_none_is_asked_for(device):
    x = draw_expanded(1, 5, 5, 1, SMALL, device=device)
    learnt = [part.clone().requires_grad_() for part in x]
    kept = []

    def saved(mode, inputs) -> int:
        kept.clear()
        with mode, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
            y = attend_expanded(*inputs, causal(device, 0), SCALE)
        assert y.requires_grad == bool(kept)
        return len(kept)

    assert saved(torch.no_grad(), learnt) == 0
    assert saved(torch.inference_mode(), learnt) == 0
    assert saved(torch.enable_grad(), x) == 0
    assert saved(torch.enable_grad(), learnt) == 8  # inputs, output, log-sum-exp, start


def test_second_derivative_is_refused(device):
    x = draw_expanded(1, 5, 5, 1, SMALL, device=device)
    learnt = [part.clone().requires_grad_() for part in x]
    y = attend_expanded(*learnt, None, SCALE)
    (dq, *_) = torch.autograd.grad(y.square().sum(), learnt, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# Which tile


def card_of(capability) -> Card:
    model = CARDS[capability]
    return Card(model.name, capability, model.n_sm, model.shared_bytes)


def test_rule_of_thumb_by_hand():
    """Hopper: 192 and 128 wide, 128 x 128 holds 48 KiB of queries and 160 KiB in flight."""
    hopper = card_of(HOPPER)
    largest, deep, small, of_registers, of_fp32 = CANDIDATES
    for n in (128, 4096, 100_000):
        assert rule_of_thumb(n, n, PUBLISHED, 2, hopper) == largest
    assert rule_of_thumb(65, 65, PUBLISHED, 2, hopper) == largest
    assert rule_of_thumb(4096, 64, PUBLISHED, 2, hopper) == deep
    assert rule_of_thumb(64, 4096, PUBLISHED, 2, hopper) == small
    assert rule_of_thumb(4096, 4096, (512, 64, 128), 2, hopper) == of_registers
    assert rule_of_thumb(4096, 4096, (128, 64, 256), 2, hopper) == of_registers
    assert rule_of_thumb(4096, 4096, PUBLISHED, 4, hopper) == of_fp32
    assert rule_of_thumb(4096, 4096, PUBLISHED, 2, card_of((8, 0))) == of_registers
    assert rule_of_thumb(4096, 4096, PUBLISHED, 2, card_of((10, 0))) == largest


def test_batch_and_heads_do_not_choose_the_tile(device):
    """Nor do they choose the row of the tuned table."""
    asked = set()
    for batch, heads in ((1, 1), (3, 1), (1, 2)):
        x = draw_expanded(batch, 4, 4, heads, SMALL, torch.bfloat16, device)
        with configs.trying(KERNEL, None) as trial:
            run(x, None)
        asked.update(trial.asked)
    assert asked == {(KERNEL, (4, *SMALL, 2))}


# Chapter hooks


MASKS = {
    "all": ([None, None], None),
    "causal": ([0, 0], None),
    "cached": ([100, 37], None),
    "before the cache": ([-80, -500], None),
    "documents": ([0, 0], some_documents(2, 230)),
}


def lists(kind: str, queries: int = 130, keys: int = 230):
    starts, documents = MASKS[kind]
    queries = keys if documents else queries
    shapes = (starts, queries, keys, 2, SMALL, 2, cards.INTERPRETER, documents)
    mask = None if starts[0] is None else causal("cpu", *starts, documents=documents)
    return mask, queries, shapes


@pytest.mark.parametrize("tile", [None, CANDIDATES[2]], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_schedule_and_traffic_are_what_the_interpreter_does(kind, tile, device):
    if device != "cpu":
        pytest.skip("NOT RUN: only the interpreter can be watched")
    mask, queries, shapes = lists(kind)
    x = draw_expanded(2, queries, 230, 2, SMALL, torch.bfloat16)
    x = Expanded(*(part.contiguous() for part in x))  # nothing is copied
    names, program = {part.data_ptr(): part for part in x}, operator.attrgetter("program")
    with using(tile), tile_loads() as loads:
        o, lse = mla_prefill.forward(*x, mask, SCALE, cards.INTERPRETER)
    with using(tile):
        steps, moved = schedule(*shapes), traffic(*shapes)

    loads.sort(key=program)  # a program's own loads stay in order
    did = [load for load in loads if load.address == x.k_nope.data_ptr()]
    assert steps == sorted(steps, key=lambda step: step.program[::-1])  # as a card starts them
    steps.sort(key=program)
    assert [(load.program, load.at) for load in did] == [
        (step.program, (step.row, step.heads[0], step.keys[0], 0)) for step in steps
    ]
    assert all(step.heads[1] == step.heads[0] + 1 for step in steps)
    of_queries = {load.program: load for load in loads if load.address == x.q_nope.data_ptr()}
    for step, load in zip(steps, did, strict=True):
        first = of_queries[step.program].at[2]
        assert step.queries == (first, min(first + of_queries[step.program].block[2], queries))
        assert step.keys[1] == min(step.keys[0] + load.block[2], 230)

    loaded = 0
    for load in loads:
        if load.address in names:  # documents are not counted
            part = names[load.address]
            shape = part.transpose(1, 2).shape if part.dim() == 4 else part.shape
            ends = zip(shape, load.at, load.block, strict=True)
            loaded += 2 * math.prod(max(0, min(n - at, size)) for n, at, size in ends)
    assert moved.loaded_bytes == loaded
    assert moved.stored_bytes == o.nbytes + lse.nbytes


@pytest.mark.parametrize("kind", MASKS)
def test_schedule_says_which_tiles_are_masked(kind):
    mask, queries, shapes = lists(kind)
    seen = torch.ones(2, queries, 230).bool()
    if mask is not None:
        seen = attention.Causal(*mask).mask(queries, 230)
    walked = torch.zeros_like(seen)
    for step in schedule(*shapes):
        tile = step.row, slice(*step.queries), slice(*step.keys)
        assert step.masked == (not seen[tile].all())
        walked[tile] = True
    assert not (seen & ~walked).any()  # what is seen is walked over


def test_traffic_by_hand():
    """One row of 256 tokens: keys of one tile of 128, then of two; queries and results once."""
    moved = traffic([0], 256, 256, 3, PUBLISHED, 2, card_of(HOPPER))
    assert moved.loaded_bytes == 3 * 2 * (256 * 192 + (1 + 2) * 128 * 320)
    assert moved.stored_bytes == 3 * 256 * (128 * 2 + 4)
    least = 2 * 256 * (3 * (192 + 256) + 64)  # the rotary key once for all heads
    assert moved.least_bytes == least + moved.stored_bytes
    assert traffic([-10], 10, 10, 1, SMALL, 2, card_of(HOPPER)).loaded_bytes == 2 * 10 * 32


# Planted bugs


def check(module) -> None:
    tile = Tile(32, 32, 8, 2)
    x = draw_expanded(2, 40, 70, 2, SMALL, torch.float16)
    assert_exact(x, None, tile, module=module)
    for starts in ((30, 5), (-3, 20)):
        mask = causal("cpu", *starts)
        assert_exact(leftovers(x, mask), mask, tile, module=module)
    x = draw_expanded(2, 50, 50, 1, SMALL, torch.float16)
    mask = causal("cpu", 0, 0, documents=some_documents(2, 50))
    assert_exact(x, mask, tile, module=module)


BUGS = {
    "a query sees the key behind it": (
        "keys[None, :] <= at[:, None]",
        "keys[None, :] <= at[:, None] + 1",
    ),
    "a query does not see itself": ("keys[None, :] <= at[:, None]", "keys[None, :] < at[:, None]"),
    "one tile too many carries no mask": (
        "where + m + 1, S), 0)",
        "where + m + BLOCK_N + 1, S), 0)",
    ),
    "the masked tiles are left out": ("mine, full, end,\n", "mine, full, full,\n"),
    "the last tile is left out": (
        "mine, full, end,\n",
        "mine, full, end // BLOCK_N * BLOCK_N,\n",
    ),
    "the tiles without a mask are left out": ("mine, begin, full,\n", "mine, begin, begin,\n"),
    "NaN behind the end meets a weight of 0": (
        "tl.where((keys < end)[:, None], values, 0.0)",
        "values",
    ),
    "keys behind the last one count": ("(keys < end)[None, :]\n", "(keys >= 0)[None, :]\n"),
    "the end is that of rows that do not exist": (
        "tl.minimum(m + BLOCK_M, T), S)",
        "m + BLOCK_M, S)",
    ),
    "the start of another row": (
        "tl.load(start + row)",
        "tl.load(start)",
    ),
    "the rotary part is dropped": (
        "tl.dot(rope, k.T, score,",
        "tl.dot(rope * 0, k.T, score,",
    ),
    "the rotary key of another row": (
        "k_rope.load([row, n, 0])",
        "k_rope.load([0, n, 0])",
    ),
    "the values of another head": (
        "v.load([row, head, n, 0])",
        "v.load([row, 0, n, 0])",
    ),
    "older sums are not rescaled": (
        "sums * factor[:, None]",
        "sums",
    ),
    "sums are not divided": (
        "sums * (1 / divisor)[:, None]",
        "sums",
    ),
    "documents do not matter": (
        "theirs[None, :] == mine[:, None]",
        "theirs[None, :] >= 0",
    ),
    "documents of another row": (
        "documents.load([row, n])",
        "documents.load([0, n])",
    ),
    "the walk begins too late": (
        "begin = tl.min(mine, 0) // BLOCK_N * BLOCK_N",
        "begin = (tl.min(mine, 0) // BLOCK_N + 1) * BLOCK_N",
    ),
    "the scale is of base e": (
        "scale * LOG2_E",
        "scale",
    ),
    "log-sum-exp of another head": (
        "num_programs(1) + head) * T",
        "num_programs(1)) * T",
    ),
    "the last query is not stored": (
        "of_row, mask=queries < T)",
        "of_row, mask=queries < T - 1)",
    ),
    "a row sees, where none is promised": (
        "not (MASKED or DOCUMENTS)",
        "True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    if bug is None:
        check(mla_prefill)
        return
    with mutated(mla_prefill, *BUGS[bug]) as copy, pytest.raises(AssertionError):
        check(copy)


SOFTMAX_BUGS = {
    "the largest is forgotten": (
        "tl.maximum(most, tl.max(score, 1) * c)",
        "tl.max(score, 1) * c",
    ),
    "the total is not rescaled": (
        "total * factor + tl.sum",
        "total + tl.sum",
    ),
    "log-sum-exp in base 2": (
        "(most + tl.log2(total)) * _LN_2",
        "most + tl.log2(total)",
    ),
    "nothing is divided by nothing": (
        "tl.where(total == 0.0, 1.0, total)",
        "total",
    ),
}


@pytest.mark.parametrize("bug", SOFTMAX_BUGS)
def test_planted_bug_of_softmax_is_seen(bug, device, monkeypatch):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    with mutated(softmax, *SOFTMAX_BUGS[bug]) as copy:
        monkeypatch.setattr(mla_prefill, "grow", copy.grow)
        monkeypatch.setattr(mla_prefill, "finish", copy.finish)
        with pytest.raises(AssertionError):
            check(mla_prefill)


# Ring 2: what the compiler makes of it


def launch(tile: list | None, kind: str, dtype: str, tokens: int, widths: list[int]) -> None:
    """Launch on tensors without memory, laid out as minids.mla leaves them."""

    def empty(*shape: int, dtype: str = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    n, r, v = widths
    kv, latent = empty(1, tokens, 128, n + v), empty(1, tokens, 512 + r)
    start = empty(1, dtype="int64")
    documents = empty(1, tokens, dtype="int64") if kind == "documents" else None
    with using(Tile(*tile) if tile else None):
        attend_expanded(
            empty(1, tokens, 128, n), empty(1, tokens, 128, r), kv[..., :n], latent[..., 512:],
            kv[..., n:], None if kind == "all" else Causal(start, documents), SCALE,
        )  # fmt: skip


def _call(tile=None, kind="causal", dtype="bfloat16", tokens=4096, widths=PUBLISHED) -> dict:
    return {"tile": tile and list(tile), "kind": kind, "dtype": dtype, "tokens": tokens,
            "widths": list(widths)}  # fmt: skip


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills, wgmma of all three products, bulk copies in and out, and as many as counted."""
    largest, deep, small, of_registers, of_fp32 = CANDIDATES
    wgmma = [_call(largest), _call(largest, "documents"), _call(deep), _call(small)]
    other = [_call(of_registers), _call(of_fp32, dtype="float32")]
    compiled = compile_calls("test_kernel_mla_prefill", "launch", wgmma + other)
    for call, (kernel,) in zip(wgmma + other, compiled, strict=True):
        found = kernel.instructions
        assert kernel.kernel == "prefill", call
        assert kernel.spilled_bytes == 0, (call, kernel)
        assert found.get("UTMALDG"), (call, kernel)
        assert found.get("UTMASTG"), (call, kernel)
        assert bool(found.get("HGMMA")) == (call in wgmma), (call, kernel)
        assert call not in wgmma or "HMMA" not in found, (call, kernel)
    assert compiled[wgmma.index(_call(small))][0].programs_on_an_sm == 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """It fits, and nothing that was spilled is read in the loop."""
    calls = [_call(), _call(dtype="float32")]
    (kernel,), (exact,) = compile_calls("test_kernel_mla_prefill", "launch", calls, capability)
    for found in (kernel, exact):
        assert not found.instructions.get("LDL"), found  # sm_120 keeps 8 bytes on the stack
        assert found.spilled_bytes <= 8, found
    assert kernel.instructions.get("UTCHMMA" if capability[0] == 10 else "HMMA"), kernel


# Ring 3: on a card


def assert_exact_on_a_card(x: Expanded, mask: Causal | None, tile: Tile | None = None) -> None:
    """Compare with FP64 on the same card: rows are too long for loops."""
    o, _ = run(x, mask, tile)
    theirs = None if mask is None else attention.Causal(*mask)
    wanted = mla.attend_expanded(*(part.double() for part in x), theirs, SCALE)
    assert error(o, wanted) < tolerance(o.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 1000, 4096])
def test_published_widths_on_a_card(tokens, dtype):
    if dtype == torch.float32:  # values are added one by one: the error grows as the root of S
        tokens = min(tokens, 1000)
    x = draw_expanded(1, tokens, tokens, 2, PUBLISHED, dtype, "cuda")
    assert_exact_on_a_card(x, causal("cuda", 0))
    assert_exact_on_a_card(x, None)
    mask = causal("cuda", 0, documents=some_documents(1, tokens))
    assert_exact_on_a_card(x, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_candidate_on_a_card(widths, tile):
    x = draw_expanded(2, 700, 1500, 3, widths, torch.bfloat16, "cuda")
    mask = causal("cuda", 500, 37)
    assert_exact(leftovers(x, mask), mask, tile)
    x = draw_expanded(2, 700, 700, 3, widths, torch.bfloat16, "cuda")
    assert_exact(x, causal("cuda", 0, 0, documents=some_documents(2, 700)), tile)


@pytest.mark.gpu
def test_wide_heads_on_a_card():
    x = draw_expanded(1, 300, 300, 2, (256, 64, 256), torch.bfloat16, "cuda")
    assert_exact_on_a_card(x, causal("cuda", 0))
    x = draw_expanded(1, 300, 300, 2, (512, 64, 512), torch.bfloat16, "cuda")
    assert_exact_on_a_card(x, causal("cuda", 0))


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    x = draw_expanded(1, 2000, 2000, 16, PUBLISHED, torch.bfloat16, "cuda")
    mask = causal("cuda", 0)
    bitwise_equal(lambda: run(x, mask), times=20)


@pytest.mark.gpu
def test_row_is_the_same_in_every_batch_on_a_card():
    x = draw_expanded(5, 1000, 1000, 8, PUBLISHED, torch.bfloat16, "cuda")
    mask = causal("cuda", 0, 0, 0, 0, 0)
    o, lse = run(x, mask)
    for row in range(5):
        alone = Expanded(*(part[row : row + 1] for part in x))
        o_alone, lse_alone = run(alone, Causal(mask.start[row : row + 1]))
        assert torch.equal(o[row : row + 1], o_alone)
        assert torch.equal(lse[row : row + 1], lse_alone)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_graph_is_captured_and_replayed_with_other_numbers(packed):
    x = draw_expanded(2, 500, 500, 4, PUBLISHED, torch.bfloat16, "cuda")
    numbers = some_documents(2, 500) if packed else None
    mask = causal("cuda", 0, 0, documents=numbers)
    attend_expanded(*x, mask, SCALE)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend_expanded(*x, mask, SCALE)
    other = draw_expanded(2, 500, 500, 4, PUBLISHED, torch.bfloat16, "cuda", seed=2)
    for old, new in zip(x, other, strict=True):
        old.copy_(new)
    if packed:
        mask.documents.copy_(torch.tensor(some_documents(2, 500, seed=3)))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, attend_expanded(*other, mask, SCALE))


@pytest.mark.gpu
def test_autocast_on_a_card():
    x = draw_expanded(1, 50, 50, 2, PUBLISHED, torch.float32, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = attend_expanded(*x, causal("cuda", 0), SCALE)
    assert y.dtype == torch.bfloat16
