"""Scaled products of few rows: equal to minids.fp8.scaled_matmul, whatever K is cut into."""

from functools import partial

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import bitwise_equal, laid_out, lengths, mutated, poisoned
from kernel_products import (
    COSINE,
    GROUPS,
    ON_A_CARD,
    QUANTISED,
    ROUNDED,
    WEIGHTS,
    Wanted,
    among_nan,
    draw,
    error,
    exact,
    on_meta,
    product,
    tolerance,
    unlike,
    using,
)  # fmt: skip
from minids_kernels import cards, configs, fp8_decode, fp8_matmul
from minids_kernels.cards import Card
from minids_kernels.fp8_decode import CANDIDATES, Decode, most_tokens, rule_of_thumb
from minids_kernels.fp8_matmul import DTYPES, scaled_matmul
from minids_kernels.tiles import by_four_warps

from minids import fp8
from minids.formats.groups import Scaled, quantise

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "fp8_decode.Decode"
TOKENS = [1, 7, 16, 17, 64, 65, 127, 128]
TILES = [config for config in CANDIDATES if config.SPLITS == 3]


def wanted(config: Decode) -> Wanted:
    return Wanted(KERNEL, config._asdict())


def splits(n: int) -> Wanted:
    return wanted(next(config for config in CANDIDATES if n == config.SPLITS))


def test_example_by_hand(device):
    """Two groups of ones: 128 * 2 * 5 from the first, one 3 * 7 from the ragged second."""
    ones = torch.ones(3, 129, device=device).to(torch.float8_e4m3fn)
    a = Scaled(ones[:1], torch.tensor([[2.0, 3.0]], device=device), (1, 128))
    b = Scaled(ones, torch.tensor([[5.0, 7.0]], device=device), (128, 128))
    for n in (1, 2):
        with using(splits(n)):
            assert (scaled_matmul(a, b) == 1301).all()


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("m", TOKENS)
def test_equals_reference(m, groups, device):
    for n, k in [(1, 1), (100, 129), (129, 576)]:
        a, b = draw(m, k, groups[0], device), draw(n, k, groups[1], device, seed=1)
        with using(splits(2)):
            y = product()(a, b)
        assert y.shape == (m, n)
        assert error(y, fp8.scaled_matmul(a, b)) < tolerance()
        assert error(y, exact(a, b)) < tolerance()


@pytest.mark.parametrize("n_splits", [1, 3, 4, 16])
@pytest.mark.parametrize("k", [128, 900, 2048])
def test_any_number_of_splits(k, n_splits, device):
    """Runs of unequal length, empty ones, and one run, which needs no second kernel."""
    a, b = draw(17, k, 1, device), draw(70, k, 128, device, seed=1)
    with using(splits(n_splits)):
        assert error(product()(a, b), exact(a, b)) < tolerance()


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("groups", [(1, 128), (1, 1)], ids=str)
def test_every_tile_equals_reference(config, groups, device):
    a, b = draw(64, 500, groups[0], device), draw(300, 500, groups[1], device, seed=1)
    with using(wanted(config)):
        assert error(product()(a, b), exact(a, b)) < tolerance()


@settings(max_examples=12)
@given(st.integers(1, 128), lengths(260), lengths(700), st.sampled_from(GROUPS),
       st.sampled_from(CANDIDATES))  # fmt: skip
def test_random_shapes_and_configs(device, m, n, k, groups, config):
    a, b = draw(m, k, groups[0], device), draw(n, k, groups[1], device, seed=1)
    with using(wanted(config)):
        assert error(product()(a, b), exact(a, b)) < tolerance()


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_rounded_once(dtype, n_splits, device):
    a, b = draw(7, 300, 1, device), draw(129, 300, 128, device, seed=1)
    with using(splits(n_splits)):
        y, wide = product()(a, b, dtype), scaled_matmul(a, b)
    assert y.dtype == dtype
    assert error(y, exact(a, b)) < tolerance(dtype)
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows 3 apart"])
def test_adds_to_out_in_place(layout, n_splits, device):
    a, b = draw(7, 300, 1, device), draw(100, 300, 1, device, seed=1)
    before = torch.randn(7, 100, device=device)
    out = laid_out(before, layout)
    with using(splits(n_splits)):
        assert scaled_matmul(a, b, out=out) is out
        assert torch.equal(out, scaled_matmul(a, b) + before)


@pytest.mark.parametrize("n_splits", [1, 2])
def test_writes_nothing_beside_out(n_splits, device):
    a, b = draw(7, 129, 1, device), draw(129, 129, 1, device, seed=1)
    memory = poisoned((7, 129), torch.float32, device, strides=(140, 1))
    memory.x.zero_()
    with using(splits(n_splits)):
        scaled_matmul(a, b, out=memory.x)
    memory.check()


@pytest.mark.parametrize("n_splits", [1, 2])
def test_infinite_scale_of_a_token_spoils_that_token_alone(n_splits, device):
    a, b = draw(20, 300, 1, device), draw(70, 300, 128, device, seed=1)
    a.scale[5, 1] = torch.inf
    with using(splits(n_splits)):
        spoiled = ~scaled_matmul(a, b).isfinite()
    assert spoiled[5].all()
    assert spoiled.sum() == 70


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cards_without_fp8_decode_bytes(groups, monkeypatch, device):
    a, b = draw(17, 300, groups[0], device), draw(70, 300, groups[1], device, seed=1)
    y = scaled_matmul(a, b)
    real = cards.card("a test", a.values)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    assert error(product()(a, b), y) < tolerance()


@pytest.mark.parametrize("n_splits", [1, 4])
def test_two_runs_are_bitwise_equal(n_splits, device):
    a, b = draw(33, 600, 1, device), draw(129, 600, 128, device, seed=1)
    with using(splits(n_splits)):
        bitwise_equal(lambda: scaled_matmul(a, b))


# Which config


def hopper() -> Card:
    model = CARDS[HOPPER]
    return Card(model.name, HOPPER, model.n_sm, model.shared_bytes)


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_knows_every_shape(capability):
    model = CARDS[capability]
    card = Card(model.name, capability, model.n_sm, model.shared_bytes)
    for n, k in WEIGHTS:
        for m in (1, 16, 64, most_tokens(card)):
            config = rule_of_thumb(m, n, k, card)
            assert config in CANDIDATES
            assert config.SPLITS == 1 or k >= 4 * 128 * config.SPLITS


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_few_tokens_keep_two_programs_on_every_multiprocessor(n, k):
    config = rule_of_thumb(16, n, k, hopper())
    programs = -(-n // config.BLOCK_N) * config.SPLITS
    assert programs >= 2 * 132 or config.SPLITS == max(
        s for s in (1, 2, 3, 4, 6, 8, 12, 16) if k >= 4 * 128 * s
    )


def test_rule_of_thumb_by_hand():
    """7168 rows are 112 tiles: three splits are 336 programs, two are 224, fewer than 264.

    128 tokens and 7168 rows are 56 tiles: of two splits all run at once, of three they do not.
    """
    assert rule_of_thumb(64, 7168, 16384, hopper()).SPLITS == 3
    assert rule_of_thumb(128, 7168, 16384, hopper()) == Decode(128, 2, 8, 4)
    assert rule_of_thumb(1, 24576, 1536, hopper()).SPLITS == 1
    assert rule_of_thumb(1, 512, 1536, hopper()).SPLITS == 3  # runs of 4 groups, none shorter


def test_cut_of_few_tokens_does_not_depend_on_their_number(device):
    """A token alone and among 63 others: the same splits, and so the same order of its sums."""
    a, b = draw(64, 2048, 1, device), draw(200, 2048, 128, device, seed=1)
    assert len({rule_of_thumb(m, 200, 2048, hopper()) for m in range(1, 65)}) == 1
    with configs.trying(KERNEL, None) as trial:
        for rows in (1, 16, 17, 64):
            part = Scaled(a.values[:rows], a.scale[:rows], a.group)
            assert error(scaled_matmul(part, b), exact(part, b)) < tolerance()
    assert len(set(trial.asked)) == 1  # of the table


@pytest.mark.parametrize("m", [64, 65, 128, 129])
def test_number_of_rows_chooses_the_kernel(m, device):
    a, b = draw(m, 100, 1, device), draw(3, 100, 128, device, seed=1)
    few = m <= (128 if by_four_warps(cards.card("a test", a.values)) else 64)
    with configs.trying(KERNEL, None) as trial:
        scaled_matmul(a, b)
    assert [kernel for kernel, _ in trial.asked] == [KERNEL if few else "fp8_matmul.Prefill"]


# Planted bugs


def check() -> None:
    a, b = draw(17, 700, 1), draw(70, 700, 128, seed=1)
    for n in (1, 4):
        with using(splits(n)):
            assert error(product()(a, b), exact(a, b)) < tolerance()
    out = torch.full((17, 70), 1000.0)
    for n in (1, 4):
        with using(splits(n)):
            scaled_matmul(a, b, out=out)
    assert error(out - 1000, 2 * exact(a, b)) < 1e-4  # FP32 beside 1000


BUGS = {
    "the scale is dropped": ("tl.dot(b, a.T) * scale", "tl.dot(b, a.T)"),
    "the scale of the next group": ("b_scale, a_scale, n, 0,", "b_scale, a_scale + a_k, n, 0,"),
    "a run starts with the scales of the first": ("a_scale += first.to(tl.int64) * a_k",
                                                  "a_scale += 0 * a_k"),
    "the last group is missing": ("end = (split + 1) * n_groups //",
                                  "end = (split + 1) * (n_groups - 1) //"),
    "a split is dropped": ("in tl.static_range(SPLITS)", "in tl.static_range(SPLITS - 1)"),
    "a split is added twice": ("splits + split * M", "splits + split // 2 * M"),
    "the last token is not stored": ("(tokens < M)", "(tokens < M - 1)"),
    "a row too many is stored": ("(rows < N)", "(rows <= N)"),
    "splits are added to out again": ("add and n_splits == 1", "False"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bug_is_seen(bug, device, monkeypatch):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    if bug is None:
        check()
        return
    with mutated(fp8_decode, *BUGS[bug]) as copy:
        monkeypatch.setattr(fp8_matmul, "fp8_decode", copy)
        with pytest.raises(AssertionError):
            check()


# Ring 2: what the compiler makes of it


def launch(config: dict | None = None, **call) -> None:
    with using(Wanted(KERNEL, config) if config else None):
        on_meta(**call)


def _call(m: int, groups: tuple[int, int], config: Decode | None = None, k: int = 7168) -> dict:
    a_group, b_group = groups
    return {"m": m, "n": 7168, "k": k, "a_group": a_group, "b_group": b_group, "add": False,
            "dtype": "bfloat16", "config": config._asdict() if config else None}  # fmt: skip


def _calls():
    """Yield every tile with the widths that tokens are padded to, and loops over splits.

    What the compiler sees of V3's sizes is whether 16 divides K / 128, a stride of the scales. To
    the kernel of the product SPLITS is a number like any other.
    """
    few, shallow, many, of_registers = (tile._replace(SPLITS=1) for tile in TILES)
    for config, widths in (
        (few, (1, 17, 64)),
        (shallow, (64,)),
        (many, (64, 128)),
        (of_registers, (1, 64)),
    ):
        for m in widths:
            yield config, _call(m, (1, 128), config)
        yield config, _call(widths[-1], (1, 1), config, k=16384)
    for config in CANDIDATES[1 : len(CANDIDATES) // len(TILES)]:
        if config.SPLITS in (2, 16):
            yield config, _call(1, (1, 128), config)


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills, wgmma of FP8 for all tiles of 64 rows, bulk loads, two programs where counted."""
    cases = list(_calls())
    compiled = compile_calls("test_kernel_fp8_decode", "launch", [call for _, call in cases])
    for (config, call), launches in zip(cases, compiled, strict=True):
        kernel, *rest = launches
        found = kernel.instructions
        assert kernel.kernel == "decode", call
        assert [other.kernel for other in rest] == ["add_up"] * (config.SPLITS > 1), call
        assert all(launch.spilled_bytes == 0 for launch in launches), (call, launches)
        assert found.get("UTMALDG"), (call, kernel)
        if config.BLOCK_N >= 64:
            assert found.get("QGMMA"), (call, kernel)
            assert not found.keys() & {"HMMA", "HGMMA", "QMMA"}, (call, kernel)
        if config.BLOCK_N == 64:  # what the rule of thumb counts for few tokens
            assert kernel.programs_on_an_sm >= 2, (call, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """It fits, and nothing that was spilled is read in the loop."""
    calls = [_call(1, (1, 1)), _call(64, (1, 128))]
    for kernel, *_ in compile_calls("test_kernel_fp8_decode", "launch", calls, capability):
        found = kernel.instructions
        assert not found.get("LDL"), kernel  # sm_120 keeps 8 bytes on the stack and never looks
        assert kernel.spilled_bytes <= 8, kernel
        wanted = {8: "HMMA" if capability == (8, 0) else "QMMA", 10: "UTCQMMA", 12: "QMMA"}
        assert found.get(wanted[capability[0]]), kernel


# Ring 3: on a card


def close_on_a_card(y, a, b) -> None:
    reference = exact(a, b)
    assert unlike(y, reference) < COSINE
    assert error(y, reference) < ON_A_CARD + ROUNDED[y.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_v3_shapes_on_a_card(weight):
    n, k = weight
    w = torch.randn(n, k, device="cuda")
    b = among_nan(quantise(w, (128, 128)))
    for m in (1, 7, 16, 17, 64, 127, 128):
        x = torch.randn(m, k, device="cuda")
        a = among_nan(quantise(x, (1, 128)))
        y = product()(a, b, torch.bfloat16)
        close_on_a_card(y, a, b)
        assert unlike(y, x @ w.mT) < QUANTISED


@pytest.mark.gpu
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_on_a_card(config):
    a, b = draw(33, 2200, 1, "cuda"), draw(2111, 2200, 128, "cuda", seed=1)
    with using(wanted(config)):
        close_on_a_card(product()(a, b, torch.bfloat16), a, b)
        out = torch.ones(33, 2111, device="cuda")
        close_on_a_card(scaled_matmul(a, b, out=out) - 1, a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_tile_in_every_group_on_a_card(config):
    for groups in GROUPS:
        for m in (7, 64) if config.BLOCK_N != 128 else (64, 101):
            a, b = draw(m, 2200, groups[0], "cuda"), draw(2111, 2200, groups[1], "cuda", seed=1)
            with using(wanted(config)):
                close_on_a_card(product()(a, b, torch.float16), a, b)


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    a, b = draw(16, 16384, 1, "cuda"), draw(7168, 16384, 128, "cuda", seed=1)
    bitwise_equal(partial(scaled_matmul, a, b), times=20)


@pytest.mark.gpu
def test_a_token_is_the_same_in_every_batch_on_a_card():
    a, b = draw(64, 7168, 1, "cuda"), draw(2112, 7168, 128, "cuda", seed=1)
    y = scaled_matmul(a, b)
    for first, end in [(0, 1), (5, 12), (63, 64), (30, 63)]:
        part = Scaled(a.values[first:end], a.scale[first:end], a.group)
        assert torch.equal(scaled_matmul(part, b), y[first:end])


@pytest.mark.gpu
@pytest.mark.parametrize("n_splits", [1, 4])
def test_graph_is_captured_and_replayed_with_other_numbers(n_splits):
    a, b = draw(16, 4096, 1, "cuda"), draw(264, 4096, 128, "cuda", seed=1)
    with using(splits(n_splits)):
        scaled_matmul(a, b, torch.bfloat16)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = scaled_matmul(a, b, torch.bfloat16)
        other = draw(16, 4096, 1, "cuda", seed=2)
        a.values.view(torch.uint8).copy_(other.values.view(torch.uint8))
        a.scale.copy_(other.scale)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, scaled_matmul(other, b, torch.bfloat16))
