"""What each program of a puzzle's kernel touches: the picture that stands beside the puzzle.

A plan is what `minids.learn.kernels.record` gives for a right kernel, written down by its tiles:
nothing here is a kernel, and no answer is given away.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minids.formats import groups
from minids.learn.kernels import Access, record
from minids.learn.puzzles import FP16, LATENT, PAGE, ROTARY, Test, pages, randn, scaled

Tiles = list[Access]


class Example(NamedTuple):
    """The inputs of a puzzle's picture, and what each program of a right kernel touches there."""

    given: tuple[Any, ...]
    shapes: dict[str, tuple[int, ...]]  # of the arrays, as the picture shows them
    tiles: Tiles


def example(number: int) -> Example:
    """Return the example of puzzle `number`, counted from 1."""
    return _EXAMPLES[number - 1]()


def reads_once(number: int, *names: str) -> Test:
    """Return a test that no program loads an element of these arrays twice, nor other ones."""

    def test(answer: Any) -> str | None:
        here = example(number)
        wants, gots = _loads(here.tiles), _loads(record(lambda: answer(*here.given)))
        for (program, name), want in wants.items():
            got = gots.get((program, name), np.zeros(0))
            if name in names and not np.array_equal(np.sort(got), np.sort(want)):
                return (
                    f"In the picture's example, program {program} loads {len(want)} elements of "
                    f"{name}, each once; yours loads {len(got)}."
                )
        return None

    return test


def tiles(number: int, answer: Any) -> Tiles:
    """Return what an answer touches in its example; nothing where it does not run through."""
    here = example(number)
    try:
        return record(lambda: answer(*here.given))
    except Exception:  # whatever it is: `check` tells it in words
        return []


def picture(number: int, answer: Any) -> str:
    """Return a picture for a notebook: the answer's tiles or, until it runs, those of the plan."""
    from figures import kernels as figures
    from figures import style

    here, found = example(number), tiles(number, answer)
    told = "What your programs touch" if found else "What each program should load and store"
    shown = style.show(figures.draw_tiles(found or here.tiles, here.shapes), figures.ALT_TILES)
    return f"<p>{told}:</p>{shown._repr_html_()}"


def _loads(tiles: Tiles) -> dict[tuple[tuple[int, ...], str], np.ndarray]:
    found: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}
    for access in tiles:
        if access.kind == "load":
            found.setdefault((access.program, access.name), []).append(access.offsets)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _tile(
    program: tuple[int, int], kind: str, name: str, rows: range, cols: range, width: int
) -> Access:
    offsets = np.add.outer(np.array(rows, np.int64) * width, np.array(cols, np.int64))
    return Access((*program, 0), kind, name, offsets.ravel())


def _cut(n: int, size: int) -> Iterator[tuple[int, range]]:
    return ((first // size, range(first, min(first + size, n))) for first in range(0, n, size))


def _add() -> Example:
    n, plan = 100, []
    for p, at in _cut(n, 32):
        sides = (("load", "x"), ("load", "y"), ("store", "out"))
        plan += [_tile((p, 0), kind, name, range(1), at, n) for kind, name in sides]
    return Example((randn(n), randn(n)), dict.fromkeys(("x", "y", "out"), (1, n)), plan)


def _rms_norm() -> Example:
    (M, N), plan = (3, 24), []
    for p in range(M):
        sides = (("load", "x", p), ("load", "gain", 0), ("store", "out", p))
        plan += [_tile((p, 0), k, name, range(m, m + 1), range(N), N) for k, name, m in sides]
    shapes = {"x": (M, N), "gain": (1, N), "out": (M, N)}
    return Example((randn(M, N), randn(N), 1e-6), shapes, plan)


def _multiply() -> Example:
    (M, N, K), plan = (24, 24, 48), []
    for i, m in _cut(M, 16):
        for j, n in _cut(N, 16):
            plan += [_tile((i, j), "load", "a", m, range(K), K)]
            plan += [_tile((i, j), "load", "b", n, range(K), K)]
            plan += [_tile((i, j), "store", "c", m, n, N)]
    given = randn(M, K, dtype=FP16), randn(N, K, dtype=FP16)
    return Example(given, {"a": (M, K), "b": (N, K), "c": (M, N)}, plan)


def _gate_up() -> Example:
    (M, F, K), plan = (24, 24, 32), []
    for i, m in _cut(M, 16):
        for j, n in _cut(F, 16):
            plan += [_tile((i, j), "load", "x", m, range(K), K)]
            both = [*n, *(F + f for f in n)]
            plan += [_tile((i, j), "load", "w", range(f, f + 1), range(K), K) for f in both]
            plan += [_tile((i, j), "store", "out", m, n, F)]
    given = randn(M, K, dtype=FP16), randn(2 * F, K, dtype=FP16)
    return Example(given, {"x": (M, K), "w": (2 * F, K), "out": (M, F)}, plan)


def _top_k() -> Example:
    (T, E, k), plan = (4, 12, 3), []
    for p in range(T):
        plan += [_tile((p, 0), "load", "score", range(p, p + 1), range(E), E)]
        plan += [_tile((p, 0), "store", "ids", range(p, p + 1), range(k), k)]
    return Example((randn(T, E), k), {"score": (T, E), "ids": (T, k)}, plan)


def _scaled_multiply() -> Example:
    (M, N, K, G), plan = (12, 160, 200, 2), []
    for i, m in _cut(M, 16):
        for j, n in _cut(N, 64):
            block = n[0] // 128
            plan += [_tile((i, j), "load", "a", m, range(K), K)]
            plan += [_tile((i, j), "load", "b", n, range(K), K)]
            plan += [_tile((i, j), "load", "a_scale", m, range(G), G)]
            plan += [_tile((i, j), "load", "b_scale", range(block, block + 1), range(G), G)]
            plan += [_tile((i, j), "store", "out", m, n, N)]
    shapes = {"a": (M, K), "b": (N, K), "a_scale": (M, G), "b_scale": (2, G), "out": (M, N)}
    return Example((scaled(M, K, groups.TILE), scaled(N, K, groups.BLOCK)), shapes, plan)


def _multiply_few() -> Example:
    (M, N, K, runs), plan = (5, 80, 96, 2), []
    for j, n in _cut(N, 32):
        for run, k in _cut(K, K // runs):
            plan += [_tile((j, run), "load", "w", n, k, K)]
            plan += [_tile((j, run), "load", "x", range(M), k, K)]
            plan += [_tile((j, run), "store", "part", range(run * M, run * M + M), n, N)]
    given = randn(M, K, dtype=FP16), randn(N, K, dtype=FP16), runs
    return Example(given, {"w": (N, K), "x": (M, K), "part": (runs * M, N)}, plan)


def _attend() -> Example:
    given, width, plan = pages(40), LATENT + ROTARY, []
    plan += [_tile((0, 0), "load", "q", range(16), range(width), width)]
    for j, page in enumerate(given[2].tolist()):
        slots = range(page * PAGE, page * PAGE + min(PAGE, 40 - j * PAGE))
        plan += [_tile((0, 0), "load", "table", range(1), range(j, j + 1), 3)]
        plan += [_tile((0, 0), "load", "store", slots, range(width), width)]
    plan += [_tile((0, 0), "store", "out", range(16), range(LATENT), LATENT)]
    shapes = {"q": (16, width), "table": (1, 3), "store": (6 * PAGE, width), "out": (16, LATENT)}
    return Example(given, shapes, plan)


_EXAMPLES: tuple[Callable[[], Example], ...] = (
    _add, _rms_norm, _multiply, _gate_up, _top_k, _scaled_multiply, _multiply_few, _attend,
)  # fmt: skip
