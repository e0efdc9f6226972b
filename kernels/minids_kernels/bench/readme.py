"""Write kernels/README.md from what lies in kernels/results: nothing in it is typed by hand."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from minids_kernels.bench.floors import DATASHEETS
from minids_kernels.bench.jobs import JOBS
from minids_kernels.bench.report import (
    HOW_TO_READ,
    JSON,
    MARKDOWN,
    NOTHING,
    number,
    peer_error,
    table,
)

KERNELS = Path(__file__).parents[2]
README, RESULTS = KERNELS / "README.md", KERNELS / "results"
NOT_MEASURED = "not yet measured"

Rows = dict[tuple[str, str], dict[str, Any]]  # of bench.json, by job and case


class Kernel(NamedTuple):
    """One row of the page: a kernel and the case that stands for it."""

    does: str
    file: str
    reference: str  # module.function of minids
    chapter: str
    job: str
    case: str


_GROUPS, _FP8, _CHAPTER = "formats.groups", "fp8", "11_fp8"
LISTED = (
    Kernel("quantise activations, 1x128", "fp8_quantise", f"{_GROUPS}.quantise", _CHAPTER,
           "quantise", "1x128, 4096 x 7168"),
    Kernel("quantise weights, 128x128", "fp8_quantise", f"{_GROUPS}.quantise", _CHAPTER,
           "quantise", "128x128, 18432 x 7168"),
    Kernel("quantise in two groupings from one read", "fp8_quantise", f"{_GROUPS}.quantise_twice",
           _CHAPTER, "quantise", "1x128 and 128x1, 4096 x 7168"),
    Kernel("group quantised numbers again", "fp8_quantise", f"{_GROUPS}.requantise", _CHAPTER,
           "quantise", "1x128 to 128x1, 4096 x 7168"),
    Kernel("dequantise", "fp8_dequantise", f"{_GROUPS}.dequantise", _CHAPTER,
           "quantise", "128x128 to BF16, 18432 x 7168"),
    Kernel("FP8 product, many tokens", "fp8_matmul", f"{_FP8}.scaled_matmul", _CHAPTER,
           "gemm", "o, 4096 x 7168 x 16384"),
    Kernel("FP8 product, few tokens", "fp8_decode", f"{_FP8}.scaled_matmul", _CHAPTER,
           "decode", "o, 16 x 7168 x 16384"),
    Kernel("FP8 gradient of a weight", "fp8_matmul", f"{_FP8}.scaled_matmul", _CHAPTER,
           "wgrad", "gate, 18432 x 7168 over 4096"),
    Kernel("attention to latents in pages, all heads", "mla_decode", "mla.attend_latent",
           "05_absorb", "mla_decode", "128 x 4096, 128 heads"),
    Kernel("attention to latents in pages, few heads", "mla_decode", "mla.attend_latent",
           "05_absorb", "mla_decode", "128 x 4096, 16 heads"),
    Kernel("attention over a prompt", "mla_prefill", "mla.attend_expanded",
           "04_mla", "mla_prefill", "4096 tokens"),
    Kernel("its gradients", "mla_prefill_backward", "mla.attend_expanded",
           "04_mla", "mla_backward", "4096 tokens"),
    Kernel("routed experts in FP8, few tokens", "moe_experts", "experts.scaled.run_scaled_experts",
           _CHAPTER, "experts", "128 tokens, 250 of 256 experts"),
    Kernel("routed experts in FP8, many tokens", "moe_experts", "experts.scaled.run_scaled_experts",
           _CHAPTER, "experts", "8192 tokens, 256 of 256 experts"),
    Kernel("routed experts in BF16 with gradients", "moe_experts", "experts.grouped.run_experts",
           "07_moe", "experts_bf16", "forward and backward, 8192 tokens"),
    Kernel("which experts, with which weights", "router_topk", "router.route",
           "07_moe", "router", "1024 x 256"),
    Kernel("RMSNorm", "norm_rms", "norm.rms_norm", "02_model", "norm", "forward, 4096 x 7168"),
    Kernel("its gradients", "norm_rms", "norm.rms_norm", "02_model",
           "norm", "gradients, 4096 x 7168"),
    Kernel("RMSNorm of a sum", "norm_rms", "fused.norm.add_rms_norm", "02_model",
           "norm", "added, 4096 x 7168"),
    Kernel("RMSNorm of a sum, quantised", "norm_rms", "fused.norm.add_rms_norm_quantise", _CHAPTER,
           "norm", "added and quantised, 4096 x 7168"),
    Kernel("rotary positions in place, queries and key", "rope_rotate", "rope.rotate", "06_rope",
           "rope", "queries and key in place, 4096 x 128 x 64"),
    Kernel("SwiGLU, forward and backward", "ffn_swiglu", "fused.swiglu.swiglu", "02_model",
           "swiglu", "forward and backward, 4096 x 18432"),
    Kernel("SwiGLU, quantised", "ffn_swiglu", "fused.swiglu.swiglu_quantise", _CHAPTER,
           "swiglu", "quantised, 32768 x 2048"),
    Kernel("its gradients out of FP8", "ffn_swiglu", "fused.swiglu.gated_backward", _CHAPTER,
           "swiglu", "gradients of FP8, 32768 x 2048"),
    Kernel("cross-entropy", "loss_cross_entropy", "fused.loss.cross_entropy", "02_model",
           "loss", "forward, 4096 x 129280"),
    Kernel("cross-entropy of states, no logits stored", "loss_linear", "loss.target_sum",
           "02_model", "loss", "from states, forward and backward, 4096 x 129280"),
    Kernel("AdamW, moments in BF16", "train_adamw", "train.make_optimizer", "14_train",
           "adamw", "BF16 moments and copy, 9.98e+08 weights"),
)  # fmt: skip

HEAD = """\
# Kernels

Triton kernels of minids: each does what a plain function of `minids/` does, has its signature, and
is tested against it. `Transformer(cfg, impl="triton")` computes with them, training included. They
are short enough to read: one file a kernel, its idea, formula, memory layout and grid on top.

This page is written by `python -m minids_kernels.bench readme` from what lies in
[results](results/README.md); no number in it is typed by hand.

## Run
"""
RINGS = (
    ("1, numbers: in Triton's interpreter, against the reference; "
     "2, code: compiled for GPUs that are not there, spills, registers, shared memory and "
     "matrix instructions asserted", "a CPU", "make check"),
    ("3, on the card: bits, tolerances, NaN in padding, equal runs, CUDA graphs", "an NVIDIA GPU",
     "PYTHONPATH=.:kernels python3 -m pytest -m gpu -o addopts=-ra tests/test_kernel_*.py"),
    ("4, the benchmark", "an NVIDIA GPU",
     "PYTHONPATH=.:kernels python3 -m minids_kernels.bench --out FOLDER"),
    ("3 and 4 in one, under 9 minutes, offline, from a plain checkout", "an NVIDIA GPU",
     "make gpu OUT=FOLDER"),
    ("a whole layer of V3 in FP8, 11.5 GB, and all of V2-Lite: a prompt, a batch, forward and "
     "backward, every part compared with torch", "an NVIDIA GPU with 80 GB",
     "PYTHONPATH=.:kernels python3 -m minids_kernels.bench layer --out FOLDER"),
    ("the tuner, which writes minids_kernels/configs.json", "an NVIDIA GPU",
     "PYTHONPATH=.:kernels python3 -m minids_kernels.bench tune --out FOLDER"),
)  # fmt: skip
NEEDS = """\
Kernels need Triton 3.6 or newer and compute capability 8.0 (Ampere). Products of FP8 use tensor
cores for it from 8.9 (Ada, Hopper, Blackwell); below, the same numbers are multiplied in BF16.

## Measured
"""
GAP = """\
## What hand-written CUDA still does better

Published on Hopper with many tokens, FP8 products with a scale for each 128 numbers ran in Triton
at 0.33 to 0.58 of the rate of hand-written ones (SGLang on GitHub, numbers 3893, 5207 and 5820).
Our goals keep a part of that gap: 0.75 of cuBLAS. The reason is control. CUDA gives one group of
warps the loads and others the products, moves registers from the first to the second, lets one
group scale its sums while another one keeps the tensor cores busy, and sends one tile to several
multiprocessors at once. Stable Triton gives no such control on Hopper; small programs, two on a
multiprocessor, are a substitute for the groups: one scales while the other one multiplies. With
few tokens reading the weights is nearly all there is to do, and no such gap is expected.

Attention has the same gap for the same reason: softmax of one tile should run beside the products
of another. Published on Hopper at our widths are 660 TFLOP/s and 3.0 TB/s for decoding (FlashMLA's
README, H800), and 572 TFLOP/s over a prompt of 4096 tokens (FlashAttention 4, H100, number 3 of
pith-train on GitHub). Our goals are 430 TFLOP/s and 2.5 TB/s, and 480 TFLOP/s.
"""


def write() -> None:
    """Write the page."""
    README.write_text(page(RESULTS), encoding="utf-8")


def page(results: Path) -> str:
    """Return the page for these results: one table a GPU, of each kernel's latest row."""
    rings = table(["ring", "needs", "command"], [[*ring[:2], f"`{ring[2]}`"] for ring in RINGS])
    parts = [HEAD, rings + "\n", NEEDS]
    cards = latest_rows(results)
    for card, rows in cards.items():
        parts += [f"### {card}\n", kernel_table(rows) + "\n"]
    if not cards:
        parts.append(kernel_table({}) + "\n")
    return "\n".join([*parts, "## How to read it\n", HOW_TO_READ + "\n", GAP])


def latest_rows(results: Path) -> dict[str, Rows]:
    """Return each card's latest row of each case, with a link to the run that it is from."""
    cards: dict[str, Rows] = {}
    for path in sorted(results.glob(f"*/*/{JSON}")):  # by card, then by date
        found = json.loads(path.read_text(encoding="utf-8"))
        run = path.parent.relative_to(results.parent)
        link = f"[{run.name}]({run}/{MARKDOWN})"
        rows = cards.setdefault(found["stamp"]["gpu"], {})
        rows |= {(row["job"], row["name"]): row | {"run": link} for row in found["rows"]}
    return cards


def kernel_table(rows: Rows) -> str:
    """Return one row a kernel; what has no result says so."""
    head = ["kernel", "reference", "chapter", "test", "shape", "measured µs", "floor µs",
            "% of floor", "check", "best peer µs (ratio)", "goals", "run"]  # fmt: skip
    return table(head, [_line(kernel, rows) for kernel in LISTED])


def _line(kernel: Kernel, rows: Rows) -> list[str]:
    module, _, function = kernel.reference.rpartition(".")
    path = f"minids/{module.replace('.', '/')}.py"
    test = f"test_kernel_{kernel.file}.py"
    chapter, book = kernel.chapter[:2], f"book/{kernel.chapter}.ipynb"
    line = [
        f"[{kernel.does}](minids_kernels/{kernel.file}.py)",
        f"[{function}](../{path})",
        f"[{chapter}](../{book})" if (KERNELS.parent / book).exists() else chapter,
        f"[{test}](../tests/{test})",
        kernel.case,
    ]
    found = rows.get((kernel.job, kernel.case))
    return line + (_results(found) if found else _floors(kernel))


def _floors(kernel: Kernel) -> list[str]:
    """Return the cells of a kernel without a result: its floors need no measurement."""
    (work,) = (case.work for case in JOBS[kernel.job]() if case.name == kernel.case)
    floors = [f"{number(work.us_at(rates))} ({card})" for card, rates in DATASHEETS.items()]
    return [NOT_MEASURED, ", ".join(floors), *[NOTHING] * 5]


def _results(row: dict[str, Any]) -> list[str]:
    ours, *peers = row["sides"].items()
    side = ours[1]
    if side["us"] is None or not side["right"]:
        return [f"no result: {side['note']}", number(row["floor_us"]), *[NOTHING] * 4, row["run"]]
    most = peer_error(side["error"])
    near = [(name, other) for name, other in peers if (other["error"] or 0.0) <= most]
    timed = [(other["us"], name) for name, other in near if other["us"] is not None]
    peer = NOTHING
    if timed:
        us, name = min(timed)
        peer = f"{name} {number(us)} ({number(us / side['us'], 2)})"
    check = side["note"] if side["error"] is None else f"{side['error']:.1e}"
    goals = [f"{goal['goal']}: {_answer(goal)}" for goal in row["goals"]]
    return [
        f"{number(side['us'])} ± {number(side['spread_us'])}",
        number(row["floor_us"]),
        number(row["percent_of_floor"]),
        check,
        peer,
        "; ".join(goals) or NOTHING,
        row["run"],
    ]


def _answer(goal: dict[str, Any]) -> str:
    if goal["reached"] is None:
        return "not measured"
    return "reached" if goal["reached"] else f"NOT reached, {number(goal['value'], 2)}"
