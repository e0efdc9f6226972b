"""What the tile walker computes: a product cut into tiles, an L2 cache beside it, waves and bytes.

    C [M, N] = A [M, K] B [N, K]^T

Programs that run at once march in step: in each step every one of them asks for a tile of A and a
tile of B. A tile that several ask for in the same step is fetched once. The cache keeps the tiles
that were asked for last, as many as fit; results and scales take no room in it. What a step or a
start costs is counted in steps, not in time.

Data    widths of minids.config's preset v3; a card's rates.
Seen in book/12_kernels.ipynb
"""

from typing import Any, NamedTuple

from minids.config import preset

ROWS = 64  # of Hopper's tensor-core product, at least
SUMS = 2**15  # FP32 sums of a program, at most: half of a multiprocessor's registers
SHARED_BYTES = 227 * 2**10  # shared memory that one program may use
LOADS = 4_000_000  # that are followed, at most
RESULT_BYTES = 2  # BF16
TOKENS, FEW_TOKENS = 4096, 16  # of a prompt; of a decoding step
H100 = dict(name="H100", multiprocessors=132, l2_mib=50.0, tb_s=3.35, tflops={"1": 1979, "2": 989})
L2_MIB = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 4.0, 16.0, 25.0, 50.0, 100.0, 200.0)


class Problem(NamedTuple):
    """A product, how it is cut, and what it runs on."""

    m: int
    n: int
    k: int
    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    group_m: int = 8
    at_once: int = 132  # programs that run at the same time
    l2_mib: float = 50.0
    number_bytes: int = 1  # of A and B
    start: int = 3  # steps that pass before a program multiplies
    persistent: bool = True
    swapped: bool = False  # B's rows stand on the 64-row side, A's on the other


class Step(NamedTuple):
    """One step of all programs that run."""

    running: int
    asked_bytes: int
    dram_bytes: int  # of these, what was not in the cache
    kept_bytes: int  # in the cache after it


class Walk(NamedTuple):
    """What a whole product costs."""

    tiles: int
    waves: int
    steps: list[Step]
    asked_bytes: int
    dram_bytes: int
    least_bytes: int  # A and B, once
    result_bytes: int
    operations: int
    masked: float  # share of the products that lie outside of the matrices
    tail: float  # share of the last wave's places without a tile
    idle: float  # share of all places and steps in which nothing is multiplied

    @property
    def intensity(self) -> float:
        """Operations for each byte that DRAM moves."""
        return self.operations / (self.dram_bytes + self.result_bytes)


def place(tile: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """Return row and column of the tile with this number: down group_m rows, then to the right.

    With 1 the tiles go row by row.
    """
    stripe = group_m * tiles_n
    first = tile // stripe * group_m
    height = min(tiles_m - first, group_m)
    inside = tile % stripe
    return first + inside % height, inside // height


def refusal(p: Problem) -> str:
    """Say why a problem is not walked; nothing where it is."""
    for name, value in (("M", p.m), ("N", p.n), ("K", p.k), ("programs at once", p.at_once)):
        if value < 1:
            return f"{name} must be an integer >= 1, got {value}"
    if p.block_m < ROWS:
        return (f"BLOCK_M must be at least {ROWS}, the rows of Hopper's tensor-core product, "
                f"got {p.block_m}: make it larger, or swap the sides")  # fmt: skip
    if (sums := p.block_m * p.block_n) > SUMS:
        return (f"BLOCK_M x BLOCK_N must be at most {SUMS:,}, half of a multiprocessor's "
                f"registers, got {sums:,}: make one smaller")  # fmt: skip
    two = 2 * (p.block_m + p.block_n) * p.block_k * p.number_bytes
    if two > SHARED_BYTES:
        return (f"tiles of two steps must fit into {SHARED_BYTES // 1024} KiB of shared memory, "
                f"got {two / 1024:g} KiB: make a BLOCK smaller")  # fmt: skip
    tiles_m, tiles_n, slices = counts(p)
    if (loads := 2 * tiles_m * tiles_n * slices) > LOADS:
        return (f"a walk must have at most {LOADS:,} loads to be followed here, got {loads:,}: "
                "make a BLOCK larger")  # fmt: skip
    return ""


def counts(p: Problem) -> tuple[int, int, int]:
    """Return rows and columns of tiles in the output, and slices of K."""
    rows, cols = (p.n, p.m) if p.swapped else (p.m, p.n)
    return -(-rows // p.block_m), -(-cols // p.block_n), -(-p.k // p.block_k)


class Cache:
    """Keeps the tiles that were asked for last."""

    def __init__(self, capacity: int):
        self.capacity, self.kept_bytes = capacity, 0
        self.tiles: dict[tuple[str, int, int], int] = {}  # the one asked for longest ago is first

    def ask(self, tile: tuple[str, int, int], size: int) -> int:
        """Return how many bytes of a tile come from DRAM: all or none."""
        missed = self.tiles.pop(tile, None) is None
        self.tiles[tile] = size
        self.kept_bytes += size if missed else 0
        while self.kept_bytes > self.capacity:
            self.kept_bytes -= self.tiles.pop(next(iter(self.tiles)))
        return size if missed else 0


def walk(p: Problem) -> Walk:
    """Follow all programs over all tiles; ValueError for what is refused."""
    if why := refusal(p):
        raise ValueError(why)
    rows, cols = (p.n, p.m) if p.swapped else (p.m, p.n)
    tiles_m, tiles_n, slices = counts(p)
    tiles = tiles_m * tiles_n
    at_once, waves = min(tiles, p.at_once), -(-tiles // p.at_once)
    cache, steps = Cache(int(p.l2_mib * 2**20)), []
    for wave in range(waves):
        wanted: dict[tuple[str, int], int] = {}  # tiles by side, in the order of their first asking
        asked = 0  # rows of both sides, of all programs
        numbers = range(wave * at_once, min(tiles, (wave + 1) * at_once))
        for row, col in (place(tile, tiles_m, tiles_n, p.group_m) for tile in numbers):
            wanted["A", row] = min(p.block_m, rows - row * p.block_m)
            wanted["B", col] = min(p.block_n, cols - col * p.block_n)
            asked += wanted["A", row] + wanted["B", col]
        for k in range(slices):
            depth = p.number_bytes * min(p.block_k, p.k - k * p.block_k)
            fetched = sum(cache.ask((*tile, k), n * depth) for tile, n in wanted.items())
            steps.append(Step(len(numbers), asked * depth, fetched, cache.kept_bytes))
    covered = tiles_m * p.block_m * tiles_n * p.block_n * slices * p.block_k
    length = waves * slices + p.start * (1 if p.persistent else waves)
    return Walk(
        tiles, waves, steps,
        asked_bytes=sum(step.asked_bytes for step in steps),
        dram_bytes=sum(step.dram_bytes for step in steps),
        least_bytes=p.number_bytes * p.k * (p.m + p.n),
        result_bytes=RESULT_BYTES * p.m * p.n,
        operations=2 * p.m * p.n * p.k,
        masked=1 - p.m * p.n * p.k / covered,
        tail=waves - tiles / p.at_once,
        idle=1 - tiles * slices / (p.at_once * length),
    )  # fmt: skip


def fed(w: Walk, number_bytes: int) -> float:
    """Return the share of an H100's peak that its DRAM can feed with operands."""
    peak = H100["tflops"][str(number_bytes)]
    return min(1.0, w.intensity * H100["tb_s"] / peak)


def products() -> dict[str, tuple[int, int]]:
    """Return V3's FP8 products by name: outputs, inputs; those that share an input are one."""
    v3 = preset("v3")
    key, value = v3.qk_nope_head_dim + v3.qk_rope_head_dim, v3.v_head_dim
    shared = v3.n_shared_experts * v3.moe_inter_dim
    return {
        "q_a + kv_a": (v3.q_lora_rank + v3.kv_lora_rank + v3.qk_rope_head_dim, v3.dim),
        "q_b": (v3.n_heads * key, v3.q_lora_rank),
        "kv_b": (v3.n_heads * (v3.qk_nope_head_dim + value), v3.kv_lora_rank),
        "o": (v3.dim, v3.n_heads * value),
        "shared gate + up": (2 * shared, v3.dim),
        "shared down": (v3.dim, shared),
        "gate + up": (2 * v3.inter_dim, v3.dim),
        "down": (v3.dim, v3.inter_dim),
    }


SMALL = Problem(560, 672, 256, 64, 64, 64, group_m=4, at_once=12, l2_mib=0.125)


def problems() -> dict[str, Problem]:
    """Return what the walker can begin with, by name."""
    found = {"a small one": SMALL}
    for name, (n, k) in products().items():
        found[f"{name}, {TOKENS:,} tokens"] = Problem(TOKENS, n, k)
    n, k = products()["o"]
    few = Problem(FEW_TOKENS, n, k, 64, 64, 128, group_m=1)
    found[f"o, {FEW_TOKENS} tokens"] = few
    found[f"o, {FEW_TOKENS} tokens, sides swapped"] = few._replace(block_n=16, swapped=True)
    return found


def data() -> dict[str, Any]:
    """Return what figures/kernels.js reads."""
    presets = [dict(name=name, **p._asdict()) for name, p in problems().items()]
    limits = dict(rows=ROWS, sums=SUMS, shared=SHARED_BYTES, loads=LOADS, result=RESULT_BYTES)
    return dict(presets=presets, limits=limits, card=H100, l2_mib=list(L2_MIB))
