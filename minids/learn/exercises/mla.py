"""Exercises of chapter 04: what is cached, by which matrices, and where the rotation goes.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.1, Eqs. 1-11; DeepSeek-V2 (arXiv:2405.04434).
Dims    T queries, S keys, H heads, N R V head widths, C and Q latents, D width.
Book    book/04_mla.ipynb               Kernel  none
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from minids.config import Config, preset
from minids.count import attention_parameters, count
from minids.learn.check import Exercise, Property, differs, within
from minids.mla import MLA
from minids.model import Transformer
from minids.rope import frequencies, phases, rotate


def _each(*tests: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Return the first trouble of several tests."""
    return lambda answer: next(filter(None, (test(answer) for test in tests)), None)


def _conversation(answer: Any) -> str | None:
    want = count(preset("v3")).cache_bytes * 131_072 / 2**30
    return within("The size in GiB", answer, 0.97 * want, 1.03 * want)


def _bytes(name: str, n_bytes: int, **changes: int) -> Callable[[Any], str | None]:
    """Compare with the cache that the package makes for one token."""
    cfg = preset(name, **changes)
    written = ", ".join([repr(name), *(f"{field}={value}" for field, value in changes.items())])
    with torch.device("meta"):
        made = Transformer(cfg).new_cache(batch=1, capacity=1).store
    want = made.numel() * n_bytes
    return lambda answer: differs(
        f"cache_bytes(preset({written}), {n_bytes})", answer(cfg, n_bytes), want
    )


def _up(heads: int, nope: int, value: int, latent: int) -> Callable[[Any], str | None]:
    """Compare with the split that MLA makes, by reading its keys and values through a layer."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(3, latent, generator=generator)
    w_ukv = torch.randn(heads * (nope + value), latent, generator=generator)
    kv = rearrange(c @ w_ukv.T, "t (h d) -> t h d", h=heads)
    call = f"With T = 3, H = {heads}, N = {nope}, V = {value}, C = {latent}: "

    def test(answer: Any) -> str | None:
        got = answer(c.clone(), w_ukv.clone(), heads, nope)  # it may change what it is given
        if got is None:
            return f"{call}expected a pair (k, v), got None: is a `return` missing?"
        if not isinstance(got, tuple | list):
            return f"{call}expected a pair (k, v), got {type(got).__name__}."
        if len(got) != 2:
            return f"{call}expected a pair (k, v), got {len(got)} values."
        wants = kv[..., :nope], kv[..., nope:]
        pairs = zip("kv", got, wants, strict=True)
        return next(filter(None, (differs(call + name, g, w) for name, g, w in pairs)), None)

    return test


def _fold(nope: int, latent: int) -> Callable[[Any], str | None]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, nope, generator=generator)
    w_uk = torch.randn(nope, latent, generator=generator)
    c = torch.randn(3, latent, generator=generator)
    want = q @ (c @ w_uk.T).T
    call = f"fold(q, w_uk) @ c.T, with N = {nope} and C = {latent},"

    def test(answer: Any) -> str | None:
        got = answer(q.clone(), w_uk.clone())
        if not isinstance(got, Tensor) or got.shape[-1:] != (latent,):
            return differs(f"fold(q, w_uk), with N = {nope} and C = {latent},", got, q @ w_uk)
        return differs(call, got @ c.T, want)

    return test


def _few_multiplications(answer: Any) -> str | None:
    """Refuse an answer that makes a matrix as wide as keys: T x C numbers are enough."""
    got = answer(torch.ones(2, 4), torch.ones(4, 3))
    return differs("The shape of fold(q, w_uk) for T = 2, N = 4, C = 3", list(got.shape), [2, 3])


def _turn(start: int, x: Tensor) -> Tensor:
    """Rotate each row of `x` [T, ..., R] by the angle of its position, `start` for the first."""
    cfg = preset("toy", qk_rope_head_dim=x.shape[-1])
    phase = phases(start + torch.arange(len(x))[None], frequencies(cfg))
    return rotate(x[None], phase)[0]


def _parts(nope: int, rope: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q_nope, q_rope, k_nope of two heads and the one k_rope, for four tokens."""
    generator = torch.Generator().manual_seed(2)
    shapes = (4, 2, nope), (4, 2, rope), (4, 2, nope), (4, rope)
    q_nope, q_rope, k_nope, k_rope = (torch.randn(s, generator=generator) for s in shapes)
    return q_nope, q_rope, k_nope, k_rope


def _unturned(x: Tensor) -> Tensor:
    return x


def _scores(nope: int, rope: int, start: int | None = 0) -> Callable[[Any], str | None]:
    """Compare with Eq. 10's scores, from positions 0 on: only the distance may count.

    `start` None: a `turn` that does nothing, so that sum and scale are told from the rotation.
    """
    q_nope, q_rope, k_nope, k_rope = _parts(nope, rope)
    content = einsum(q_nope, k_nope, "t h n, s h n -> h t s")
    by_position = _unturned if start is None else partial(_turn, 0)
    position = einsum(by_position(q_rope), by_position(k_rope), "t h r, s r -> h t s")
    want = (content + position) / (nope + rope) ** 0.5
    turn = _unturned if start is None else partial(_turn, start)
    where = "a `turn` that does nothing" if start is None else f"first position {start}"
    call = f"scores(...) with N = {nope}, R = {rope}, {where}"
    return lambda answer: differs(call, answer(*_parts(nope, rope), turn), want, 1e-4)


def _parameters(name: str, **changes: Any) -> Callable[[Any], str | None]:
    cfg = preset(name, **changes)
    written = ", ".join([repr(name), *(f"{field}={value}" for field, value in changes.items())])
    want = attention_parameters(cfg)
    return lambda answer: differs(f"mla_parameters(preset({written}))", answer(cfg), want)


# what an implementation caches a token and layer: the package's own, and those it must be told from


def _package(cfg: Config) -> int:
    mla = MLA(cfg)
    phase = phases(torch.zeros(1, 1, dtype=torch.int64), frequencies(cfg))
    return mla.latents(torch.zeros(1, 1, cfg.dim), phase).shape[-1]


def _key_per_head(cfg: Config) -> int:
    return cfg.kv_lora_rank + cfg.n_heads * cfg.qk_rope_head_dim


def _expanded(cfg: Config) -> int:
    return cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)


def _shared_by_pairs(cfg: Config) -> int:
    return cfg.kv_lora_rank + (cfg.n_heads + 1) // 2 * cfg.qk_rope_head_dim


def _multi_query(cfg: Config) -> int:
    return replace(cfg, attn="mqa").cache_dim


def _told(measure: Callable[[Config], int], what: str, want: bool) -> Callable[[Any], str | None]:
    call = f"ignores_heads(measure), where `measure` counts what {what} caches,"
    return lambda answer: differs(call, answer(measure), want)


_V3 = "of DeepSeek-V3 it is the number that minids counts"

EXERCISES = (
    Exercise(
        name="gib",
        title="One long conversation",
        statement=(
            "A conversation of 131,072 tokens is kept in DeepSeek-V3's latent cache in BF16, two "
            "bytes a number. How many GiB ($2^{30}$ bytes) is that? Work it out on paper from "
            "$L = 61$ layers, $C = 512$ and $R = 64$; an answer within 3 % is right."
        ),
        start="gib = ...\n",
        properties=(Property("the size is right within 3 %", _conversation),),
        hints=(
            "Four factors: tokens, layers, numbers a token and layer, bytes a number.",
            "What a token leaves in a layer is one latent and one rotary key, whatever H is.",
            "131,072 x 61 x (512 + 64) x 2 bytes, divided by 2^30.",
        ),
        solution=(
            "# a latent of C = 512 and one rotary key of R = 64 a token and layer; H is not in it\n"
            "numbers_a_token = 61 * (512 + 64)\n"
            "gib = 131_072 * numbers_a_token * 2 / 2**30\n"
        ),
        wrong={
            "the rotary key is forgotten": "gib = 131_072 * 61 * 512 * 2 / 2**30\n",
            "a rotary key for every head": ("gib = 131_072 * 61 * (512 + 128 * 64) * 2 / 2**30\n"),
            "MHA of the same heads": "gib = 131_072 * 61 * 128 * (128 + 128) * 2 / 2**30\n",
            "billions of bytes instead of GiB": "gib = 131_072 * 61 * 576 * 2 / 1e9\n",
        },
    ),
    Exercise(
        name="cache_bytes",
        title="The cache, as a formula",
        statement=(
            "Write `cache_bytes(cfg, n_bytes)`: the bytes that one token leaves in the caches of "
            "all layers of an MLA model, at `n_bytes` a number. Use the fields of `Config` "
            "(`n_layers`, `kv_lora_rank`, ...), not `cfg.cache_dim`."
        ),
        start="def cache_bytes(cfg, n_bytes):\n    raise NotImplementedError\n",
        properties=(
            Property(
                "of the preset toy it is what the package's cache of one token measures",
                _bytes("toy", 4),
            ),
            Property(
                "it does not change with the number of heads",
                _each(_bytes("toy", 4, n_heads=6), _bytes("v3_layer", 2, n_heads=16)),
            ),
            Property(
                "it grows with the latent, with the rotary key and with the layers",
                _each(
                    _bytes("toy", 2, kv_lora_rank=7),
                    _bytes("toy", 2, qk_rope_head_dim=6),
                    _bytes("toy", 2, n_layers=5),
                ),
            ),
            Property(_V3, _bytes("v3", 2)),
        ),
        hints=(
            "Which of the tensors in Eqs. 1 to 11 must a later token read again?",
            "c_kv of width C, and the rotary key of width R; both once, not once a head.",
            "n_layers * (kv_lora_rank + qk_rope_head_dim) * n_bytes.",
        ),
        solution=(
            "def cache_bytes(cfg, n_bytes):\n"
            "    # keys and values of all heads are made from c_kv again, so they are not kept;\n"
            "    # k_rope is one vector that all heads share\n"
            "    numbers = cfg.kv_lora_rank + cfg.qk_rope_head_dim\n"
            "    return cfg.n_layers * numbers * n_bytes\n"
        ),
        wrong={
            "the rotary key is forgotten": (
                "def cache_bytes(cfg, n_bytes):\n"
                "    return cfg.n_layers * cfg.kv_lora_rank * n_bytes\n"
            ),
            "a rotary key for every head": (
                "def cache_bytes(cfg, n_bytes):\n"
                "    keys = cfg.n_heads * cfg.qk_rope_head_dim\n"
                "    return cfg.n_layers * (cfg.kv_lora_rank + keys) * n_bytes\n"
            ),
            "expanded keys and values": (
                "def cache_bytes(cfg, n_bytes):\n"
                "    head = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim\n"
                "    return cfg.n_layers * cfg.n_heads * head * n_bytes\n"
            ),
            "a latent for keys and another for values": (
                "def cache_bytes(cfg, n_bytes):\n"
                "    numbers = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim\n"
                "    return cfg.n_layers * numbers * n_bytes\n"
            ),
        },
    ),
    Exercise(
        name="expand",
        title="Keys and values from the latent",
        statement=(
            "Write `expand(c, w_ukv, n_heads, nope)`: make every head's keys and values from "
            "latents `c` $[T, C]$. The rows of `w_ukv` $[H (N + V), C]$ are stored head by head: "
            "head 0's key, head 0's value, head 1's key, ... Return the pair `(k, v)` of shapes "
            "$[T, H, N]$ and $[T, H, V]$; `nope` is $N$."
        ),
        start="def expand(c, w_ukv, n_heads, nope):\n    raise NotImplementedError\n",
        properties=(
            Property(
                "keys and values are those of the stored order, head by head", _up(2, 4, 4, 4)
            ),
            Property("keys and values may differ in width", _up(2, 4, 2, 3)),
            Property("one head needs no order", _up(1, 3, 5, 2)),
        ),
        hints=(
            "One product makes all H (N + V) numbers of a token; the rest is cutting.",
            'First cut into heads: rearrange(..., "t (h d) -> t h d", h=n_heads).',
            "Then cut the last axis: a head's first N numbers are its key, the rest its value.",
        ),
        solution=(
            "from einops import rearrange\n\n\n"
            "def expand(c, w_ukv, n_heads, nope):\n"
            "    # heads first: a head's rows lie together, key before value\n"
            '    kv = rearrange(c @ w_ukv.T, "t (h d) -> t h d", h=n_heads)\n'
            "    return kv[..., :nope], kv[..., nope:]\n"
        ),
        wrong={
            "all keys first, then all values": (
                "from einops import rearrange\n\n\n"
                "def expand(c, w_ukv, n_heads, nope):\n"
                "    k, v = (c @ w_ukv.T).tensor_split([n_heads * nope], dim=-1)\n"
                '    k = rearrange(k, "t (h n) -> t h n", h=n_heads)\n'
                '    return k, rearrange(v, "t (h v) -> t h v", h=n_heads)\n'
            ),
            "heads as the fast axis": (
                "from einops import rearrange\n\n\n"
                "def expand(c, w_ukv, n_heads, nope):\n"
                '    kv = rearrange(c @ w_ukv.T, "t (d h) -> t h d", h=n_heads)\n'
                "    return kv[..., :nope], kv[..., nope:]\n"
            ),
            "values before keys": (
                "from einops import rearrange\n\n\n"
                "def expand(c, w_ukv, n_heads, nope):\n"
                '    kv = rearrange(c @ w_ukv.T, "t (h d) -> t h d", h=n_heads)\n'
                "    value = kv.shape[-1] - nope\n"
                "    return kv[..., value:], kv[..., :value]\n"
            ),
        },
    ),
    Exercise(
        name="fold",
        title="Fold W_UK into the query",
        statement=(
            "One head, no rotation. Its keys would be `k = c @ w_uk.T`, with latents `c` $[S, C]$ "
            "and `w_uk` $[N, C]$, and its scores `q @ k.T` with queries `q` $[T, N]$. Write "
            "`fold(q, w_uk)`: queries of width $C$ such that `fold(q, w_uk) @ c.T` are the same "
            "scores. No key may be made, and the scale $1/\\sqrt{N + R}$ stays outside."
        ),
        start="def fold(q, w_uk):\n    raise NotImplementedError\n",
        properties=(
            Property("the scores are the same where N = C", _fold(4, 4)),
            Property("the scores are the same where N and C differ", _fold(3, 5)),
            Property("the result has the latent's width", _few_multiplications),
        ),
        hints=(
            "Write the scores as one product of three matrices and move the brackets.",
            "q k^T = q (c W^T)^T = q W c^T.",
            "Return q @ w_uk, of shape [T, N] x [N, C].",
        ),
        solution=(
            "def fold(q, w_uk):\n"
            "    # q (c W^T)^T = (q W) c^T: brackets move, nothing else does\n"
            "    return q @ w_uk\n"
        ),
        wrong={
            "the matrix the other way round": (
                "def fold(q, w_uk):\n"
                "    square = w_uk.shape[0] == w_uk.shape[1]\n"
                "    return q @ (w_uk.T if square else w_uk)\n"
            ),
            "the inverse, as if the latent were decoded": (
                "import torch\n\n\ndef fold(q, w_uk):\n    return q @ torch.linalg.pinv(w_uk).T\n"
            ),
            "scaled by the latent's width": (
                "def fold(q, w_uk):\n    return q @ w_uk / w_uk.shape[1] ** 0.5\n"
            ),
        },
    ),
    Exercise(
        name="scores",
        title="Where does the rotation go?",
        statement=(
            "Write `scores(q_nope, q_rope, k_nope, k_rope, turn)`, the scores of Eq. 10 before "
            "mask and softmax, $[H, T, S]$, scaled. Nothing is rotated yet: `turn(x)` rotates each "
            "row of `x` by the angle of its position. `q_nope` and `k_nope` are $[T, H, N]$, "
            "`q_rope` is $[T, H, R]$, and `k_rope` is $[S, R]$: one key for all heads. Here "
            "$T = S$, and no YaRN is in the scale."
        ),
        start=(
            "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n    raise NotImplementedError\n"
        ),
        properties=(
            Property("content and position are summed, then scaled", _scores(4, 2, start=None)),
            Property("the rotary parts turn, and nothing else", _scores(4, 2)),
            Property("positions 100, 101, ... give what 0, 1, ... give", _scores(4, 2, start=100)),
            Property("the scale is right for other widths", _scores(6, 4)),
        ),
        hints=(
            "Eq. 9 and 4 concatenate; the product of two concatenations is a sum of two products.",
            "Only q_rope and k_rope turn; k_rope has no head axis, so all heads meet the same key.",
            "(q_nope . k_nope + turn(q_rope) . turn(k_rope)) / sqrt(N + R), with einsum.",
        ),
        solution=(
            "from einops import einsum\n\n\n"
            "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n"
            '    content = einsum(q_nope, k_nope, "t h n, s h n -> h t s")  # knows no position\n'
            "    # one rotary key for all heads: no h in its pattern\n"
            '    position = einsum(turn(q_rope), turn(k_rope), "t h r, s r -> h t s")\n'
            "    width = q_nope.shape[-1] + q_rope.shape[-1]  # of the concatenated head\n"
            "    return (content + position) / width**0.5\n"
        ),
        wrong={
            "everything turns": (
                "from einops import einsum\n\n\n"
                "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n"
                '    content = einsum(turn(q_nope), turn(k_nope), "t h n, s h n -> h t s")\n'
                '    position = einsum(turn(q_rope), turn(k_rope), "t h r, s r -> h t s")\n'
                "    width = q_nope.shape[-1] + q_rope.shape[-1]\n"
                "    return (content + position) / width**0.5\n"
            ),
            "only the key turns": (
                "from einops import einsum\n\n\n"
                "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n"
                '    content = einsum(q_nope, k_nope, "t h n, s h n -> h t s")\n'
                '    position = einsum(q_rope, turn(k_rope), "t h r, s r -> h t s")\n'
                "    width = q_nope.shape[-1] + q_rope.shape[-1]\n"
                "    return (content + position) / width**0.5\n"
            ),
            "the scale of the content alone": (
                "from einops import einsum\n\n\n"
                "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n"
                '    content = einsum(q_nope, k_nope, "t h n, s h n -> h t s")\n'
                '    position = einsum(turn(q_rope), turn(k_rope), "t h r, s r -> h t s")\n'
                "    return (content + position) / q_nope.shape[-1] ** 0.5\n"
            ),
            "no rotation": (
                "from einops import einsum\n\n\n"
                "def scores(q_nope, q_rope, k_nope, k_rope, turn):\n"
                '    content = einsum(q_nope, k_nope, "t h n, s h n -> h t s")\n'
                '    position = einsum(q_rope, k_rope, "t h r, s r -> h t s")\n'
                "    width = q_nope.shape[-1] + q_rope.shape[-1]\n"
                "    return (content + position) / width**0.5\n"
            ),
        },
    ),
    Exercise(
        name="mla_parameters",
        title="What the layer weighs",
        statement=(
            "Write `mla_parameters(cfg)`: the parameters of one MLA layer, every matrix of Eqs. 1 "
            "to 11 and the gains of both latent norms. Where `cfg.q_lora_rank` is 0, queries are "
            "not compressed: one matrix from $D$ to $H (N + R)$, and no norm. Use the fields of "
            "`Config`; V3's layer has 187,107,328."
        ),
        start="def mla_parameters(cfg):\n    raise NotImplementedError\n",
        properties=(
            Property("the toy layer is counted to the last gain", _parameters("toy")),
            Property(
                "each width enters as it should",
                _each(
                    _parameters("toy", n_heads=3),
                    _parameters("toy", kv_lora_rank=5),
                    _parameters("toy", qk_rope_head_dim=8),
                    _parameters("toy", v_head_dim=7),
                ),
            ),
            Property(_V3, _parameters("v3")),
            Property("queries that are not compressed are counted too", _parameters("v2_lite")),
        ),
        hints=(
            "Eight matrices: W_DQ, W_UQ, W_QR, W_DKV, W_KR, W_UK, W_UV, W_O. Write D, Q, C, ... "
            "beside each.",
            "W_KR is D x R: one rotary key. W_QR is Q x H R: a rotary query for every head.",
            "Q (D + 1 + H (N + R)) + D (C + R) + C + C H (N + V) + H V D; without Q its part is "
            "D H (N + R).",
        ),
        solution=(
            "def mla_parameters(cfg):\n"
            "    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank\n"
            "    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim\n"
            "    # W_DQ, its norm's gains, then W_UQ and W_QR; or one matrix\n"
            "    queries = d * q + q + q * h * (n + r) if q else d * h * (n + r)\n"
            "    down = d * (c + r) + c  # W_DKV, W_KR, gains (the rotary key has none)\n"
            "    up = c * h * (n + v)  # W_UK, W_UV\n"
            "    return queries + down + up + h * v * d  # W_O\n"
        ),
        wrong={
            "the norms are forgotten": (
                "def mla_parameters(cfg):\n"
                "    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank\n"
                "    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim\n"
                "    queries = q * (d + h * (n + r)) if q else d * h * (n + r)\n"
                "    return queries + d * (c + r) + c * h * (n + v) + h * v * d\n"
            ),
            "a rotary key for every head": (
                "def mla_parameters(cfg):\n"
                "    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank\n"
                "    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim\n"
                "    queries = q * (d + 1 + h * (n + r)) if q else d * h * (n + r)\n"
                "    return queries + d * (c + h * r) + c + c * h * (n + v) + h * v * d\n"
            ),
            "one rotary query for all heads": (
                "def mla_parameters(cfg):\n"
                "    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank\n"
                "    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim\n"
                "    queries = q * (d + 1 + h * n + r) if q else d * (h * n + r)\n"
                "    return queries + d * (c + r) + c + c * h * (n + v) + h * v * d\n"
            ),
            "V2-Lite's queries count for nothing": (
                "def mla_parameters(cfg):\n"
                "    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank\n"
                "    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim\n"
                "    queries = q * (d + 1 + h * (n + r))\n"
                "    return queries + d * (c + r) + c + c * h * (n + v) + h * v * d\n"
            ),
        },
    ),
    Exercise(
        name="ignores_heads",
        title="A test that catches a wrong MLA",
        statement=(
            "Write `ignores_heads(measure)`: return `True` if what an implementation caches does "
            "not depend on the number of heads, else `False`. `measure(cfg)` returns the numbers "
            "that it caches a token and layer for a `Config`. Your test is tried on the package "
            "and on wrong implementations, which it must tell apart."
        ),
        start="def ignores_heads(measure):\n    raise NotImplementedError\n",
        properties=(
            Property("it passes the package", _told(_package, "minids.mla.MLA", True)),
            Property(
                "it catches a rotary key for every head",
                _told(_key_per_head, "a layer with a rotary key for every head", False),
            ),
            Property(
                "it catches expanded keys and values",
                _told(_expanded, "a layer that keeps every head's key and value", False),
            ),
            Property(
                "it catches one rotary key for two heads",
                _told(_shared_by_pairs, "a layer where each two heads share a rotary key", False),
            ),
            Property(
                "it asks about heads alone: MQA passes",
                _told(_multi_query, "MQA, with its one key and value,", True),
            ),
        ),
        hints=(
            "Measure the same config twice, with another number of heads.",
            'preset("toy", n_heads=...) changes one field and leaves the others.',
            'Compare measure(preset("toy", n_heads=h)) for h = 1, 2, 8: all must be equal.',
        ),
        solution=(
            "from minids import preset\n\n\n"
            "def ignores_heads(measure):\n"
            "    # far apart, and 1 among them: keys that a few heads share must show too\n"
            '    return len({measure(preset("toy", n_heads=h)) for h in (1, 2, 8)}) == 1\n'
        ),
        wrong={
            "it accepts everything": "def ignores_heads(measure):\n    return True\n",
            "it compares with C + R at one number of heads": (
                "from minids import preset\n\n\n"
                "def ignores_heads(measure):\n"
                '    cfg = preset("toy", n_heads=1)\n'
                "    return measure(cfg) == cfg.kv_lora_rank + cfg.qk_rope_head_dim\n"
            ),
            "it tries 1 and 2 heads only": (
                "from minids import preset\n\n\n"
                "def ignores_heads(measure):\n"
                '    one, two = preset("toy", n_heads=1), preset("toy", n_heads=2)\n'
                "    return measure(one) == measure(two)\n"
            ),
            "it asks for C + R, which MQA has not": (
                "from minids import preset\n\n\n"
                "def ignores_heads(measure):\n"
                '    configs = [preset("toy", n_heads=h) for h in (1, 2, 8)]\n'
                "    return all(measure(cfg) == cfg.cache_dim for cfg in configs)\n"
            ),
        },
    ),
)
