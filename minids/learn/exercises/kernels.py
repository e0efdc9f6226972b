"""Exercises of chapter 12: eight kernels, from a vector's sum to a step of latent attention.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 2.1.1, 2.1.2, 3.3.2, Figure 7b.
Dims    M, N rows of the operands, K the summed axis, as in kernels/; F hidden width, E experts.
Book    book/12_kernels.ipynb           Kernel  none
"""

from functools import partial
from typing import Any

from minids.formats.groups import BLOCK, TILE
from minids.learn.check import Exercise, Property
from minids.learn.plans import picture, reads_once
from minids.learn.puzzles import (
    FP16,
    Test,
    agrees,
    among_nan,
    attended,
    best,
    gated,
    normalised,
    pages,
    product,
    randn,
    scaled,
    scaled_product,
)

_HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
_EMPTY = "    raise NotImplementedError\n"
_NARROW = 2e-3  # a sum that was rounded to FP16 is told by a property of its own
Change = tuple[str, str]  # a piece of the solution, and what stands there instead


def _KernelExercise(
    *,
    number: int,
    signature: str,
    launcher: str,
    solution: str,
    wrong: dict[str, Change | tuple[Change, ...]],
    **rest: Any,
) -> Exercise:
    """Return an exercise whose start has the launcher and asks for the kernel's body."""

    def source(body: str) -> str:
        return f"{_HEAD}{signature}{body}\n\n{launcher}"

    changed = {mistake: source(_changed(solution, pieces)) for mistake, pieces in wrong.items()}
    full = source(solution) if solution else ""
    drawn = partial(picture, number)
    return Exercise(start=source(_EMPTY), solution=full, wrong=changed, picture=drawn, **rest)


def _changed(body: str, pieces: Change | tuple[Change, ...]) -> str:
    for old, new in pieces if isinstance(pieces[0], tuple) else (pieces,):
        assert body.count(old) == 1, f"no such piece, or several: {old}"
        body = body.replace(old, new)
    return body


def _sum_of(n: int) -> Test:
    x = among_nan(randn(n + 1)[1:])  # another one than y
    return agrees(lambda x, y: x + y, "add(x {}, y {})", x, randn(n))


def _norm_of(M: int, N: int, size: float = 1.0, apart: int = 0) -> Test:
    x = among_nan(size * randn(M, N + apart))[:, :N]
    return agrees(normalised, "rms_norm(x {}, gain {}, eps={})", x, randn(N), 1e-6)


def _product_of(M: int, N: int, K: int) -> Test:
    a, b = randn(M, K, dtype=FP16), randn(N, K, dtype=FP16)
    return agrees(product, "multiply(a {}, b {})", a, b, tolerance=_NARROW)


def _long_product(answer: Any) -> str | None:
    ones = [among_nan(randn(16, 2048, dtype=FP16).fill_(1.03125)) for _ in "ab"]
    call = "multiply(a {}, b {}), all numbers 1.03125,"
    return agrees(product, call, *ones)(answer)


def _gated_of(M: int, F: int, K: int) -> Test:
    x, w = randn(M, K, dtype=FP16), randn(2 * F, K, dtype=FP16)
    return agrees(gated, "gate_up(x {}, w {})", x, w)


def _best_of(rows: list[list[float]], k: int) -> Test:
    score = among_nan(randn(len(rows), len(rows[0])).new_tensor(rows))
    return agrees(best, f"top_k({rows}, k={k})", score, k)


def _scaled_of(M: int, N: int, K: int) -> Test:
    call = "scaled_multiply(a {}, b {})"
    return agrees(scaled_product, call, scaled(M, K, TILE), scaled(N, K, BLOCK))


def _few_of(M: int, N: int, K: int, runs: int) -> Test:
    x, w = randn(M, K, dtype=FP16), randn(N, K, dtype=FP16)
    return agrees(product, "multiply_few(x {}, w {}, runs={})", x, w, runs)


def _step_of(length: int, size: float = 1.0) -> Test:
    call = "attend(q {}, store {}, table {}, length={}, scale={})"
    return agrees(attended, call, *pages(length, size))


EXERCISES = (
    _KernelExercise(
        number=1,
        name="add",
        title="A sum, tile by tile",
        statement="Write `add_kernel`: `out = x + y` for vectors of `n` numbers. Program "
        "`tl.program_id(0)` makes `BLOCK` of them; a mask keeps the last program inside. What "
        "nobody writes stays NaN.",
        signature="def add_kernel(x, y, out, n, BLOCK: tl.constexpr):\n",
        launcher="""def add(x, y):
    out = x.new_full(x.shape, float("nan"))
    programs = triton.cdiv(len(x), 32)
    add_kernel[(programs,)](x, y, out, len(x), BLOCK=32)
    return out
""",
        properties=(
            Property("two whole tiles are summed", _sum_of(64)),
            Property("a last tile may be ragged", _sum_of(100)),
            Property("one tile may be more than there is", _sum_of(5)),
            Property("no number is loaded twice", reads_once(1, "x", "y")),
        ),
        hints=(
            "A program knows its number. Which are the first and the last element of its tile?",
            "at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK); x + at are BLOCK pointers.",
            "tl.load(x + at, mask=at < n), the same for y, then tl.store(out + at, sum, mask=...).",
        ),
        solution="""    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < n  # the last tile may reach past the end
    left = tl.load(x + place, mask=live)
    right = tl.load(y + place, mask=live)
    tl.store(out + place, left + right, mask=live)
""",
        wrong={
            "no mask": (
                ("x + place, mask=live", "x + place"),
                ("y + place, mask=live", "y + place"),
                ("right, mask=live", "right"),
            ),
            "only the store is masked": (
                ("x + place, mask=live", "x + place"),
                ("y + place, mask=live", "y + place"),
            ),
            "every program makes the first tile": ("tl.program_id(0) * BLOCK + ", ""),
            "the last tile is left out": ("live = place < n", "live = place < n // BLOCK * BLOCK"),
            "tiles overlap": ("left = tl", "left = tl.load(x + place, mask=live)\n    left = tl"),
        },
    ),
    _KernelExercise(
        number=2,
        name="rms_norm",
        title="A row in one read",
        statement="Write `rms_norm_kernel`: one program normalises one row of `x` `[M, N]`, "
        "FP32: $y_n = x_n\\, g_n / \\sqrt{\\mathrm{mean}(x^2) + \\varepsilon}$. `BLOCK` is the "
        "next power of two, for `tl.arange` takes no other; rows of `x` lie `stride` apart, those "
        "of `out` `N`. Read every number once: the row stays in registers.",
        signature="def rms_norm_kernel(x, gain, out, N, stride, eps, BLOCK: tl.constexpr):\n",
        launcher="""def rms_norm(x, gain, eps):
    (M, N), block = x.shape, triton.next_power_of_2(x.shape[1])
    out = x.new_full((M, N), float("nan"))
    rms_norm_kernel[(M,)](x, gain, out, N, x.stride(0), eps, block)
    return out
""",
        properties=(
            Property("a row of 32 numbers is normalised", _norm_of(1, 32)),
            Property("a row need not be a power of two", _norm_of(3, 24)),
            Property("rows may lie apart in memory", _norm_of(3, 16, apart=5)),
            Property("eps is added under the root", _norm_of(2, 32, size=1e-3)),
            Property("x is read once", reads_once(2, "x")),
        ),
        hints=(
            "Which row? Which columns of it exist? What must the others be, so that a sum of "
            "squares does not see them?",
            "tl.load(x + row * stride + cols, mask=cols < N, other=0.0); tl.sum(..., axis=0) / N.",
            "scale = tl.rsqrt(tl.sum(row * row, axis=0) / N + eps); store row * scale * g.",
        ),
        solution="""    m, cols = tl.program_id(0), tl.arange(0, BLOCK)
    live = cols < N
    row = tl.load(x + m * stride + cols, mask=live, other=0.0)
    mean = tl.sum(row * row, axis=0) / N  # zeros behind the row add nothing, but N counts
    g = tl.load(gain + cols, mask=live)
    tl.store(out + m * N + cols, row * tl.rsqrt(mean + eps) * g, mask=live)
""",
        wrong={
            "the mean of BLOCK numbers": ("axis=0) / N", "axis=0) / BLOCK"),
            "nothing in place of what is masked": (", other=0.0", ""),
            "rows taken to lie N apart": ("m * stride", "m * N"),
            "eps outside of the root": ("tl.rsqrt(mean + eps)", "(1 / (tl.sqrt(mean) + eps))"),
            "x is read again": (
                "g = tl",
                "row = tl.load(x + m * stride + cols, mask=live)\n    g = tl",
            ),
        },
    ),
    _KernelExercise(
        number=3,
        name="multiply",
        title="A product of tiles",
        statement="Write `multiply_kernel`: `c = a b^T` for `a` `[M, K]` and `b` `[N, K]`, FP16, "
        "and `c` `[M, N]`, FP32. A program makes `BLOCK` x `BLOCK` numbers of `c`: along K it "
        "loads `BLOCK_K` columns of both at a time, multiplies by `tl.dot`, and adds in FP32. "
        "No size need be a multiple of a tile.",
        signature="def multiply_kernel(a, b, c, M, N, K, BLOCK: tl.constexpr, "
        "BLOCK_K: tl.constexpr):\n",
        launcher="""def multiply(a, b):
    (M, K), N = a.shape, len(b)
    c = a.new_full((M, N), float("nan")).float()
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
    multiply_kernel[grid](a, b, c, M, N, K, BLOCK=16, BLOCK_K=16)
    return c
""",
        properties=(
            Property("one tile is multiplied", _product_of(16, 16, 16)),
            Property("K may have several tiles", _product_of(16, 16, 48)),
            Property("program 0 counts rows, program 1 columns", _product_of(48, 16, 16)),
            Property("M and N may be ragged", _product_of(20, 23, 16)),
            Property("K may be ragged", _product_of(16, 16, 40)),
            Property("sums are kept in FP32", _long_product),
            Property("a program reads its own rows, once", reads_once(3, "a", "b")),
        ),
        hints=(
            "Start from a tile of zeros in FP32; each step of `for k in range(0, K, BLOCK_K)` "
            "adds one small product.",
            "rows[:, None] * K + k[None, :] are the offsets of a tile. A ragged K needs zeros: "
            "the mask has two conditions.",
            "sums += tl.dot(left, right.T), where right is [BLOCK, BLOCK_K] of b's rows; store at "
            "rows[:, None] * N + cols[None, :].",
        ),
        solution="""    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for offset in range(0, K, BLOCK_K):
        k = offset + tl.arange(0, BLOCK_K)[None, :]
        left = tl.load(a + m * K + k, mask=(m < M) & (k < K), other=0.0)
        right = tl.load(b + n * K + k, mask=(n < N) & (k < K), other=0.0)
        total += tl.dot(left, right.T)
    # n names rows of b, which are columns of c
    tl.store(c + m * N + n.T, total, mask=(m < M) & (n.T < N))
""",
        wrong={
            "K's last tile unmasked": (
                ("(m < M) & (k < K)", "m < M"),
                ("(n < N) & (k < K)", "n < N"),
            ),
            "the last step alone": ("total += tl.dot", "total = tl.dot"),
            "the sum in FP16": (
                ("BLOCK), tl.float32)", "BLOCK), tl.float16)"),
                ("tl.dot(left, right.T)", "tl.dot(left, right.T).to(tl.float16)"),
            ),
            "rows and columns exchanged": (
                ("m = tl.program_id(0)", "m = tl.program_id(1)"),
                ("n = tl.program_id(1)", "n = tl.program_id(0)"),
            ),
            "K rounded down": ("range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
        },
    ),
    _KernelExercise(
        number=4,
        name="gate_up",
        title="SwiGLU before anything is stored",
        statement="Write `gate_up_kernel`: `x` `[M, K]`, FP16, meets `w` `[2 F, K]`, whose first F "
        "rows make the gate and the others the up-projection; `out` `[M, F]`, FP32, is "
        "silu(gate) * up, with silu(t) = t sigmoid(t). A program keeps two sums, both fed by the "
        "same tile of `x`, and neither is ever stored.",
        signature="def gate_up_kernel(x, w, out, M, F, K, BLOCK: tl.constexpr, "
        "BLOCK_K: tl.constexpr):\n",
        launcher="""def gate_up(x, w):
    (M, K), F = x.shape, len(w) // 2
    out = x.new_full((M, F), float("nan")).float()
    grid = (triton.cdiv(M, 16), triton.cdiv(F, 16))
    gate_up_kernel[grid](x, w, out, M, F, K, BLOCK=16, BLOCK_K=16)
    return out
""",
        properties=(
            Property("one tile of each half", _gated_of(16, 16, 16)),
            Property("SwiGLU waits for all of K", _gated_of(16, 16, 48)),
            Property("up begins F rows below gate", _gated_of(16, 40, 16)),
            Property("M and K may be ragged", _gated_of(5, 16, 24)),
            Property("a tile of x serves both halves", reads_once(4, "x")),
        ),
        hints=(
            "It is kernels.3 with two sums. Where does the row of up lie that belongs to f?",
            "Rows f and F + f of w; inside the loop two tl.dot with the same left operand.",
            "After the loop: gate * tl.sigmoid(gate) * up, stored with mask (m < M) & (f.T < F).",
        ),
        solution="""    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    gate = tl.zeros((BLOCK, BLOCK), tl.float32)
    up = tl.zeros((BLOCK, BLOCK), tl.float32)
    for offset in range(0, K, BLOCK_K):
        k = offset + tl.arange(0, BLOCK_K)[None, :]
        inside = (f < F) & (k < K)
        left = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0)
        gate += tl.dot(left, tl.load(w + f * K + k, mask=inside, other=0.0).T)
        up += tl.dot(left, tl.load(w + (F + f) * K + k, mask=inside, other=0.0).T)
    # both sums are complete only here
    hidden = gate * tl.sigmoid(gate) * up
    tl.store(out + m * F + f.T, hidden, mask=(m < M) & (f.T < F))
""",
        wrong={
            "silu of the wrong half": (
                "gate * tl.sigmoid(gate) * up",
                "gate * tl.sigmoid(up) * up",
            ),
            "up beside gate's tile": ("(F + f) * K", "(BLOCK + f) * K"),
            "silu in every step": (
                ("        up += tl", "        gate = gate * tl.sigmoid(gate)\n        up += tl"),
                ("gate * tl.sigmoid(gate) * up", "gate * up"),
            ),
            "x is read for each half": (
                "        up += tl",
                "        left = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0)\n"
                "        up += tl",
            ),
        },
    ),
    _KernelExercise(
        number=5,
        name="top_k",
        title="The router's choice in one word",
        statement="Write `top_k_kernel`: a program takes a row of `score` `[T, E]`, FP32, and "
        "writes the ids of its K largest, largest first; of equal scores the lower id. Pack score "
        "and id into one int64, so that a single `tl.max` settles both. The bits of a positive "
        "float are ordered as an integer is; those of a negative one backwards. "
        "Scores may be -inf; none is NaN or -0.",
        signature="def top_k_kernel(score, ids, E, K: tl.constexpr, BLOCK: tl.constexpr):\n",
        launcher="""def top_k(score, k):
    (T, E), block = score.shape, triton.next_power_of_2(score.shape[1])
    ids = score.new_full((T, k), -1).long()
    top_k_kernel[(T,)](score, ids, E, k, block)
    return ids
""",
        properties=(
            Property("the largest come first", _best_of([[0.1, 0.4, 0.2, 0.3]], 3)),
            Property("of equal ones the lower id comes first", _best_of([[0.5, 0.7, 0.5, 0.7]], 4)),
            Property("negative scores keep their order", _best_of([[-0.5, -0.25, -3.0, 0.1]], 4)),
            Property("E may be no power of two", _best_of([[-1.0, -2.0, -3.0]] * 2, 2)),
            Property("-inf comes last", _best_of([[-float("inf"), -2.0, -float("inf")]], 2)),
        ),
        hints=(
            "Put what matters more into the upper 32 bits. Which number, in the lower bits, is "
            "larger for a lower id?",
            "x.to(tl.int32, bitcast=True) are the bits; where they are negative, ^ 0x7FFFFFFF "
            "turns their order. Shift by 32 only after .to(tl.int64).",
            "key = (bits.to(tl.int64) << 32) | (BLOCK - 1 - expert). K times: tl.max(key), decode "
            "the id from & 0xFFFFFFFF, then make that key the smallest of all.",
        ),
        solution="""    row, expert = tl.program_id(0), tl.arange(0, BLOCK)
    live = expert < E
    number = tl.load(score + row * E + expert, mask=live, other=-float("inf"))
    bits = number.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # now ordered as the numbers are
    key = (bits.to(tl.int64) << 32) | (BLOCK - 1 - expert)  # a lower id wins a tie
    for rank in tl.static_range(K):
        most = tl.max(key, axis=0)
        tl.store(ids + row * K + rank, BLOCK - 1 - (most & 0xFFFFFFFF))
        key = tl.where(key == most, -(2**63), key)  # chosen: out of the race
""",
        wrong={
            "a tie goes to the higher id": (
                ("| (BLOCK - 1 - expert)", "| expert"),
                ("BLOCK - 1 - (most & 0xFFFFFFFF)", "most & 0xFFFFFFFF"),
            ),
            "negative bits as they are": ("bits ^ 0x7FFFFFFF, bits)", "bits, bits)"),
            "zeros behind the row": ('other=-float("inf")', "other=0.0"),
            "the same expert again": ("key == most, -(2**63), key", "key == most, key, key"),
        },
    ),
    _KernelExercise(
        number=6,
        name="scaled_multiply",
        title="The block-scaled product",
        statement="Write `scaled_kernel`, the product of [chapter 11](11_fp8.ipynb): `a` `[M, K]` "
        "and `b` `[N, K]` in E4M3, `a_scale` `[M, G]` a factor for each row and 128 columns, "
        "`b_scale` one for 128 x 128, row-major too, and `out` `[M, N]` in FP32. "
        "G = ceil(K / 128). Each group's sum starts from zero and is scaled before it is added. "
        "`BLOCK_N` divides 128, so a tile lies in one row of `b_scale`.",
        signature="""def scaled_kernel(
    a, b, a_scale, b_scale, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
""",
        launcher="""def scaled_multiply(a, b):
    (M, K), N = a.values.shape, len(b.values)
    out = a.scale.new_full((M, N), float("nan"))
    scaled_kernel[(triton.cdiv(M, 16), triton.cdiv(N, 64))](
        a.values, b.values, a.scale, b.scale, out, M, N, K, 16, 64
    )
    return out
""",
        properties=(
            Property("one group is scaled", _scaled_of(16, 64, 128)),
            Property("each group has its own scales", _scaled_of(16, 64, 384)),
            Property("b has a scale for 128 rows", _scaled_of(16, 256, 256)),
            Property("all sizes may be ragged", _scaled_of(5, 72, 200)),
            Property("values are read once a tile", reads_once(6, "a", "b")),
        ),
        hints=(
            "kernels.3 with BLOCK_K = 128, and a factor between tl.dot and the sum.",
            "For group g: BLOCK_M scales at a_scale + m * G + g, and one at b_scale + "
            "(first column // 128) * G + g.",
            "sums += tl.dot(left, right.T) * rows * block, where rows is [BLOCK_M, 1]. "
            "Mask the loads of rows by m < M.",
        ),
        solution="""    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    G = tl.cdiv(K, 128)
    block_row = tl.program_id(1) * BLOCK_N // 128
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(G):
        k = g * 128 + tl.arange(0, 128)[None, :]
        left = tl.load(a + m * K + k, mask=(m < M) & (k < K), other=0.0)
        right = tl.load(b + n * K + k, mask=(n < N) & (k < K), other=0.0)
        rows = tl.load(a_scale + m * G + g, mask=m < M, other=0.0)
        block = tl.load(b_scale + block_row * G + g)
        # tl.dot starts from zero: this is the promotion every 128 products
        total += tl.dot(left, right.T) * rows * block
    tl.store(out + m * N + n.T, total, mask=(m < M) & (n.T < N))
""",
        wrong={
            "scaled at the end": (
                ("tl.dot(left, right.T) * rows * block", "tl.dot(left, right.T)"),
                ("n.T, total, mask", "n.T, total * rows * block, mask"),
            ),
            "a row of scales for each tile": ("* BLOCK_N // 128", "* 1"),
            "the first row's scale for all": ("a_scale + m * G + g", "a_scale + m * 0 + g"),
            "the scales divide": ("* rows * block", "/ rows / block"),
            "scales laid out by columns": ("a_scale + m * G + g", "a_scale + g * M + m"),
        },
    ),
    _KernelExercise(
        number=7,
        name="multiply_few",
        title="Few rows: sides swapped, K cut",
        statement="Write `few_kernel` for `x` `[M, K]` of at most 16 rows and `w` `[N, K]`, FP16. "
        "Rows of `w` take the left side: a program makes 32 x 16 numbers, *transposed*. K is cut "
        "into runs, so that more programs read: run r of R, `tl.program_id(1)`, takes K's tiles "
        "from `r * tiles // R` to `(r + 1) * tiles // R` and stores to its own `[M, N]` of `part` "
        "`[R, M, N]`, FP32, which the launcher adds in order. A run may be empty.",
        signature="""def few_kernel(
    x, w, part, M, N, K,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
""",
        launcher="""def multiply_few(x, w, runs):
    (M, K), N = x.shape, len(w)
    part = x.new_full((runs, M, N), float("nan")).float()
    few_kernel[(triton.cdiv(N, 32), runs)](x, w, part, M, N, K, 32, 16, 16)
    return sum(part[1:], part[0])
""",
        properties=(
            Property("one run, 16 rows", _few_of(16, 32, 32, 1)),
            Property("fewer rows, stored as [M, N]", _few_of(3, 40, 32, 1)),
            Property("several runs share K", _few_of(4, 32, 64, 2)),
            Property("K may be ragged, runs unequal", _few_of(4, 32, 72, 3)),
            Property("an empty run adds zero", _few_of(2, 32, 16, 3)),
            Property("every weight is read once", reads_once(7, "w")),
        ),
        hints=(
            "Swapped sides: tl.dot(weights, tokens.T) is [BLOCK_N, BLOCK_M]. Which index moves "
            "along which axis when it is stored?",
            "tiles = tl.cdiv(K, BLOCK_K); for tile in range(r * tiles // R, (r + 1) * tiles // R). "
            "R is tl.num_programs(1).",
            "Store sums.T at part + r * M * N + m * N + n, with m as a column and n as a row; "
            "store it in empty runs too.",
        ),
        solution="""    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    run, runs, tiles = tl.program_id(1), tl.num_programs(1), tl.cdiv(K, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(run * tiles // runs, (run + 1) * tiles // runs):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        weights = tl.load(w + n * K + k, mask=(n < N) & (k < K), other=0.0)
        tokens = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0)
        total += tl.dot(weights, tokens.T)  # the long side is the weight's
    # an empty run stores its zeros: the launcher adds all runs
    to = part + run * M * N + m * N + n.T
    tl.store(to, total.T, mask=(m < M) & (n.T < N))
""",
        wrong={
            "stored as it was made": (
                ("m * N + n.T", "n * M + m.T"),
                ("total.T, mask=(m < M) & (n.T < N)", "total, mask=(m.T < M) & (n < N)"),
            ),
            "every run takes all of K": (
                "range(run * tiles // runs, (run + 1) * tiles // runs)",
                "range(0, tiles)",
            ),
            "the tail of K in no run": ("tl.cdiv(K, BLOCK_K)", "K // BLOCK_K"),
            "an empty run stores nothing": ("(n.T < N))", "(n.T < N) & (run < tiles))"),
            "runs of rounded length": (
                "range(run * tiles // runs, (run + 1) * tiles // runs)",
                "range(run * (tiles // runs), (run + 1) * (tiles // runs))",
            ),
        },
    ),
    _KernelExercise(
        number=8,
        name="attend",
        title="A step of latent attention",
        statement="Write `attend_kernel`: 16 heads, one new token, absorbed queries `q` "
        "`[H, C + R]`. The cache `store` `[pages, PAGE, C + R]`, FP32, holds latents and rotary "
        "keys; the sequence's pages are `table[0]`, `table[1]`, ..., its slots number `length`, "
        "and all others may be NaN. Scores are `scale` q·slot; `out` `[H, C]` is the mean of the "
        "*latents*, weighed by softmax. Walk over pages, and read each slot once.",
        signature="""def attend_kernel(
    q, store, table, out, length, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
""",
        launcher="""def attend(q, store, table, length, scale):
    (H, width), page = q.shape, store.shape[1]
    out = q.new_full((H, width - 16), float("nan"))
    attend_kernel[(1,)](q, store, table, out, length, scale, H, width - 16, 16, page)
    return out
""",
        properties=(
            Property("one full page", _step_of(16)),
            Property("pages come in the table's order", _step_of(32, size=0.0)),
            Property("the largest score so far rescales what was added", _step_of(48, size=4.0)),
            Property("scores may be large", _step_of(48, size=60.0)),
            Property("the last page may be part empty", _step_of(41)),
            Property("a slot is read once, as key and as value", reads_once(8, "store")),
        ),
        hints=(
            "Keep three things a head: the largest score so far, the sum of weights, and the "
            "weighted sum of latents. What happens to the last two when the first one grows?",
            "weight = tl.exp(score - new[:, None]); old sums are multiplied by "
            "tl.exp(most - new). Scores of empty slots are -inf.",
            "Load c [PAGE, C] and r [PAGE, R] with mask and other=0.0; score is "
            "tl.dot(q_c, c.T) + tl.dot(q_r, r.T); values are c again: tl.dot(weight, c).",
        ),
        solution="""    heads, slots = tl.arange(0, H), tl.arange(0, PAGE)
    row, cols, rotary = heads[:, None] * (C + R), tl.arange(0, C), C + tl.arange(0, R)
    q_c, q_r = tl.load(q + row + cols), tl.load(q + row + rotary)
    most = tl.full((H,), -float("inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    mean = tl.zeros((H, C), tl.float32)
    for j in range(tl.cdiv(length, PAGE)):
        page = tl.load(table + j).to(tl.int64)  # offsets may pass 2^31
        live = j * PAGE + slots < length
        slot, there = store + (page * PAGE + slots)[:, None] * (C + R), live[:, None]
        c = tl.load(slot + cols, mask=there, other=0.0)
        r = tl.load(slot + rotary, mask=there, other=0.0)
        score = scale * (tl.dot(q_c, c.T) + tl.dot(q_r, r.T))
        score = tl.where(live, score, -float("inf"))
        new = tl.maximum(most, tl.max(score, axis=1))
        weight, shrink = tl.exp(score - new[:, None]), tl.exp(most - new)
        total = total * shrink + tl.sum(weight, axis=1)
        mean = mean * shrink[:, None] + tl.dot(weight, c)  # the same tile, now as values
        most = new
    tl.store(out + heads[:, None] * C + cols, mean / total[:, None])
""",
        wrong={
            "old sums are not rescaled": ("mean * shrink[:, None] +", "mean +"),
            "no largest score is taken off": (
                ("tl.exp(score - new[:, None]), tl.exp(most - new)", "tl.exp(score), 1.0"),
                ("shrink[:, None]", "shrink"),
            ),
            "pages in the order of memory": ("tl.load(table + j)", "(tl.load(table + j) * 0 + j)"),
            "empty slots have score 0": ('score, -float("inf"))', "score, 0.0)"),
            "empty slots are loaded": (
                ("c = tl.load(slot + cols, mask=there, other=0.0)", "c = tl.load(slot + cols)"),
                ("r = tl.load(slot + rotary, mask=there, other=0.0)", "r = tl.load(slot + rotary)"),
            ),
            "the latent is loaded twice": (
                "        most = new",
                "        c = tl.load(slot + cols, mask=there, other=0.0)\n        most = new",
            ),
        },
    ),
)
