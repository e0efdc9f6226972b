"""Chapter 12: what watches kernels, its eight puzzles, their pictures, what stands under a roof."""

import json
import linecache
from pathlib import Path

import numpy as np
import pytest
import torch

from minids import check
from minids.learn import kernels, plans, puzzles, roof
from minids.learn.check import chapter, find

triton = pytest.importorskip("triton", reason="NOT RUN: Triton is not installed (Linux has it)")
tl = triton.language
pytestmark = pytest.mark.skipif(
    not kernels.is_interpreted(), reason="NOT RUN: chapter 12 runs in Triton's interpreter"
)

ROOT = Path(__file__).parents[1]
HAS_KEYS = bool(find("kernels.1").solution)
needs_keys = pytest.mark.skipif(not HAS_KEYS, reason="NOT RUN: a copy without solutions")
NUMBERS = range(1, len(chapter("kernels")) + 1)

# which mistake must be told by which property: the first property that fails is what a reader sees
TOLD = {
    1: {
        "no mask": "ragged",
        "only the store is masked": "ragged",
        "every program makes the first tile": "two whole tiles",
        "the last tile is left out": "ragged",
        "tiles overlap": "loaded twice",
    },
    2: {
        "the mean of BLOCK numbers": "power of two",
        "nothing in place of what is masked": "power of two",
        "rows taken to lie N apart": "apart in memory",
        "eps outside of the root": "under the root",
        "x is read again": "read once",
    },
    3: {
        "K's last tile unmasked": "K may be ragged",
        "the last step alone": "several tiles",
        "the sum in FP16": "FP32",
        "rows and columns exchanged": "program 1 columns",
        "K rounded down": "K may be ragged",
    },
    4: {
        "silu of the wrong half": "one tile",
        "up beside gate's tile": "F rows below",
        "silu in every step": "all of K",
        "x is read for each half": "both halves",
    },
    5: {
        "a tie goes to the higher id": "lower id",
        "negative bits as they are": "negative",
        "zeros behind the row": "no power of two",
        "the same expert again": "largest come first",
    },
    6: {
        "scaled at the end": "own scales",
        "a row of scales for each tile": "128 rows",
        "the first row's scale for all": "one group",
        "the scales divide": "one group",
        "scales laid out by columns": "own scales",
    },
    7: {
        "stored as it was made": "16 rows",
        "every run takes all of K": "several runs",
        "the tail of K in no run": "ragged",
        "an empty run stores nothing": "empty run",
        "runs of rounded length": "ragged",
    },
    8: {
        "old sums are not rescaled": "rescales",
        "no largest score is taken off": "may be large",
        "pages in the order of memory": "order",
        "empty slots have score 0": "part empty",
        "empty slots are loaded": "part empty",
        "the latent is loaded twice": "read once",
    },
}
MISTAKES = [(n, mistake) for n, mistakes in TOLD.items() for mistake in mistakes]


def value(source: str, name: str):
    """Run a cell's source, where Triton finds it as in a notebook; return what it defines."""
    file = f"<{name} {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, object] = {}
    exec(compile(source, file, "exec"), names)
    return names[name]


def merged(tiles: plans.Tiles) -> dict[tuple, list[int]]:
    """Return all that each program touches of each array, sorted, with what it touches twice."""
    found: dict[tuple, list[int]] = {}
    for access in tiles:
        key = (access.program, access.kind, access.name)
        found[key] = sorted(found.get(key, []) + access.offsets.tolist())
    return found


# Puzzles


@needs_keys
def test_every_mistake_has_a_property_of_its_own():
    assert {n: set(mistakes) for n, mistakes in TOLD.items()} == {
        n: set(find(f"kernels.{n}").wrong) for n in NUMBERS
    }


@needs_keys
@pytest.mark.parametrize(("number", "mistake"), MISTAKES)
def test_a_mistake_is_told_by_the_property_that_it_breaks(number, mistake):
    this = find(f"kernels.{number}")
    verdict = check(f"kernels.{number}", value(this.wrong[mistake], this.name))
    assert TOLD[number][mistake] in str(verdict.failed), verdict.text


@needs_keys
@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_kernel_touches_what_the_picture_shows(number):
    this = find(f"kernels.{number}")
    found = plans.tiles(number, value(this.solution, this.name))
    assert merged(found) == merged(plans.example(number).tiles)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_picture_is_the_plan_until_there_is_an_answer(number):
    this = find(f"kernels.{number}")
    start = value(this.start, this.name)
    assert plans.tiles(number, start) == []
    shown = check(f"kernels.{number}", start)._repr_html_()
    assert f">○ kernels.{number}: not answered yet." in shown
    assert "<p>What each program should load and store:</p><img alt=" in shown
    names = {access.name for access in plans.example(number).tiles}
    assert names == set(plans.example(number).shapes)


@needs_keys
def test_the_picture_of_an_answer_is_its_own():
    this = find("kernels.1")
    right, twice = (value(s, this.name) for s in (this.solution, this.wrong["tiles overlap"]))
    shown = [check("kernels.1", answer)._repr_html_() for answer in (right, twice)]
    assert all("<p>What your programs touch:</p><img" in html for html in shown)
    assert shown[0].partition("<img")[2] != shown[1].partition("<img")[2]


def test_other_chapters_show_text_alone():
    assert check("fp8.1", ...)._repr_html_() is None


@needs_keys
def test_a_stray_access_is_told_with_program_and_place():
    this = find("kernels.1")
    verdict = check("kernels.1", value(this.wrong["no mask"], this.name))
    assert "add(x [100], y [100]): program (3, 0, 0) loads x at 100, and x has 100" in verdict.text


@needs_keys
def test_an_error_in_a_kernel_is_told_as_it_is():
    this = find("kernels.1")
    broken = this.solution.replace("tl.store(", "tl.stoer(")
    text = check("kernels.1", value(broken, this.name)).text
    assert "It raised AttributeError: module 'triton.language' has no attribute 'stoer'" in text


def test_what_is_not_written_is_told():
    verdict = check("kernels.1", lambda x, y: torch.full_like(x, torch.nan))
    assert "gave nan (never written, or made of" in verdict.text


def test_a_result_that_no_kernel_made_reads_nothing():
    assert str(check("kernels.1", lambda x, y: x + y).failed).startswith("no number is loaded")


# Inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_inputs_lie_among_nan(dtype):
    x = torch.ones(2, 3).to(dtype)
    inside = puzzles.among_nan(x)
    assert torch.equal(inside.float(), x.float())
    flat = torch.empty(0, dtype=inside.dtype).set_(inside.untyped_storage()).float()
    assert flat.isnan().sum() == len(flat) - 6
    assert flat[:100].isnan().all()
    assert flat[-100:].isnan().all()


def test_pages_hold_nan_where_no_slot_is():
    _, store, table, length, _ = puzzles.pages(41)
    assert store[table.long()].flatten(0, 1)[:length].isfinite().all()
    assert store.isnan().all(-1).sum() == store.shape[0] * puzzles.PAGE - length


# What watches kernels


@triton.jit
def copy(x, out, n, first, WITH_OTHER: tl.constexpr):
    at = first + tl.arange(0, 8)
    if WITH_OTHER:
        tile = tl.load(x + at, mask=at < n, other=0)
    else:
        tile = tl.load(x + at, mask=at < n)
    tl.store(out + at - first, tile)


@triton.jit
def count(out, n):
    total = 0
    for step in range(0, n, 2):
        total += step
    tl.store(out, total)


@triton.jit
def two(x, y, out):
    at = tl.arange(0, 4)
    tl.store(out + at + 4 * tl.program_id(1), tl.load(x + at) + tl.load(y + at))


def test_programs_kinds_names_and_offsets_are_recorded():
    whole = torch.arange(20.0)
    x, y, out = whole[2:6], whole[10:14], torch.zeros(8)
    seen = kernels.record(lambda: two[(1, 2)](x, y, out))
    assert [(a.program, a.kind, a.name, a.offsets.tolist()) for a in seen] == [
        ((0, p, 0), kind, name, [at + n for n in range(4)])
        for p in range(2)
        for kind, name, at in (("load", "x", 0), ("load", "y", 0), ("store", "out", 4 * p))
    ]
    assert all(access.offsets.dtype == np.int64 for access in seen)
    assert torch.equal(out[:4], x + y)


@pytest.mark.parametrize(
    ("n", "first", "told"),
    [
        (100, 4, r"program \(0, 0, 0\) loads x at 10, and x has 10 elements"),
        (100, -3, r"loads x at -3, and x has 10 elements"),
    ],
)
def test_what_lies_outside_is_refused_before_it_is_touched(n, first, told):
    x, out = torch.arange(10.0), torch.zeros(8)
    with pytest.raises(kernels.OutOfBoundsError, match=told):
        kernels.record(lambda: copy[(1,)](x, out, n, first, True))
    assert not out.any()


def test_a_store_outside_is_refused():
    x, out = torch.arange(10.0), torch.zeros(7)
    with pytest.raises(kernels.OutOfBoundsError, match=r"stores out at 7, and out has 7"):
        kernels.record(lambda: copy[(1,)](x, out, 10, 0, True))
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_load_without_other_leaves_nan(dtype):
    x = torch.arange(10.0).to(dtype)
    for with_other in (False, True):
        out = torch.ones(8, dtype=dtype)
        kernels.record(lambda o=out, w=with_other: copy[(1,)](x, o, 10, 6, w))
        assert out[:4].tolist() == [6, 7, 8, 9]
        assert (out[4:] == 0).all() if with_other else out[4:].isnan().all()


def test_integers_without_other_are_zero():
    out = torch.ones(8, dtype=torch.int32)
    kernels.record(lambda: copy[(1,)](torch.arange(10).int(), out, 10, 6, False))
    assert out.tolist() == [6, 7, 8, 9, 0, 0, 0, 0]


def test_a_kernels_number_may_bound_a_loop():
    """Warnings are errors here: NumPy's about it would be one."""
    out = torch.zeros(1, dtype=torch.int32)
    kernels.record(lambda: count[(1,)](out, 7))
    assert out.item() == 0 + 2 + 4 + 6


def test_nothing_is_watched_afterwards():
    from triton.runtime import interpreter

    def parts():
        builder = interpreter.InterpreterBuilder
        return (
            interpreter._patch_lang_tensor,
            interpreter.GridExecutor._init_args_hst,
            builder.create_masked_load,
            builder.create_masked_store,
        )

    before = parts()
    with pytest.raises(ZeroDivisionError):
        kernels.record(lambda: 1 / 0)
    assert parts() == before


@pytest.fixture
def unpatched(monkeypatch):
    """Let `begin` change the interpreter for this test alone."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", interpreter._patch_lang_tensor)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return interpreter


def test_begin_says_where_kernels_run(unpatched):
    assert "on the CPU" in kernels.begin()
    mended = unpatched._patch_lang_tensor
    kernels.begin()
    assert unpatched._patch_lang_tensor is mended, "once is enough"
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](out, 7)
    assert out.item() == 12


def test_without_triton_the_chapter_stops_in_a_sentence(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(kernels.NotHereError, match="it exists for Linux alone") as caught:
        kernels.begin()
    (shown,) = caught.value._render_traceback_()
    assert "Open in Colab" in shown
    assert "\n" not in shown


def test_triton_that_was_loaded_for_a_gpu_is_told(unpatched, monkeypatch):
    monkeypatch.setattr(tl, "cdiv", lambda: None)
    with pytest.raises(kernels.NotHereError, match="restart the notebook's kernel"):
        kernels.begin()


def test_compiled_kernels_cannot_be_watched(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(kernels.NotHereError, match="only the interpreter can be watched"):
        kernels.record(lambda: None)


# Under the roof


def test_this_cpu_is_measured():
    here = roof.this_cpu()
    assert 1e-4 < here.tb_s < 10
    assert 1e-3 < here.tflops < 1000


def test_products_by_hand():
    points = {point.name: point for point in roof.products()}
    assert len(points) == 6
    operations, moved = 2 * 16 * 7168 * 16384, 16 * 16384 + 7168 * 16384 + 2 * 16 * 7168
    assert points["o, 16"].intensity == pytest.approx(operations / moved, rel=1e-3)
    assert points["o, 16"].family == "16 tokens"


def test_cards_by_their_datasheets():
    cards = {card.name: card for card in roof.cards()}
    assert cards["NVIDIA H100 80GB HBM3, FP8"][1:] == (3.35, 1979)


def side(us: float | None, right: bool = True) -> dict:
    return {"us": us, "right": right}


def case(job: str, name: str, floor_us: float, **sides: dict) -> dict:
    sides = {name.replace("matmul", "torch.matmul"): found for name, found in sides.items()}
    return {"job": job, "name": name, "operations": 2e9, "moved_bytes": 1e7,
            "floor_us": floor_us, "sides": sides}  # fmt: skip


@pytest.fixture
def results(tmp_path) -> Path:
    """Return a folder with results that nobody measured."""
    rows = [
        case("levels", "2 tiled, 8192 x 8192 x 8192", 100, minids=side(400), matmul=side(125)),
        case("levels", "3 rasterised, 8192 x 8192 x 8192", 100, minids=side(300, right=False)),
        case("levels", "4 pipelined, 8192 x 8192 x 8192", 100, minids=side(None)),
        case("gemm", "o, 4096 x 7168 x 16384", 10, minids=side(20)),
        case("gemm", "down, 4096 x 7168 x 18432", 10, minids=side(20)),
        case("quantise", "o, 1", 10, minids=side(20)),
        case("decode", "kv_b, 16 x 32768 x 512", 10, minids=side(None)),
    ]
    folder = tmp_path / "results/card/2030-01-01"
    folder.mkdir(parents=True)
    found = {"stamp": {"gpu": "Card"}, "rows": rows}
    (folder / "bench.json").write_text(json.dumps(found), encoding="utf-8")
    return tmp_path / "results"


def test_levels_are_read_from_results(results):
    from minids_kernels.levels import LEVELS

    ((run, bars),) = roof.levels(results)
    assert run == "Card, kernels/results, 2030-01-01"
    assert [bar.name for bar in bars] == [f"{at.number} {at.name}" for at in LEVELS]
    assert bars[1] == ("2 tiled", 25.0, 80.0)
    assert [bar.percent for bar in bars].count(None) == 7, "wrong and missing ones have no bar"


def test_measured_products_are_read_from_results(results):
    (point,) = roof.measured(results)
    assert point == ("o, 4096 x 7168 x 16384", 200.0, 2e9 / 20 / 1e6, "Card")


def test_without_results_nothing_is_told(tmp_path):
    assert roof.levels(tmp_path) == []
    assert roof.measured(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_the_chapters_cells_draw_with_and_without_results(there, results, monkeypatch, capsys):
    from minids_kernels.bench import readme

    from figures import kernels as figures
    from figures import style

    monkeypatch.setattr(readme, "RESULTS", results if there else results / "none")
    cells = json.loads((ROOT / "book/12_kernels.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"roof": roof, "figures": figures, "style": style, "here": roof.cards()[0]}
    ran = [source for source in sources if "roof.measured()" in source or "roof.levels()" in source]
    assert len(ran) == 2
    for source in ran:
        exec(source, names)
    assert ("Card, kernels/results, 2030-01-01" in capsys.readouterr().out) == there
    assert len(names["drawn"]) == there
