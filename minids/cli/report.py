"""What `minids count` prints: every count with its share and its unit, and what is on disk.

Paper   DeepSeek-V3 (arXiv:2412.19437), Table 1, for the hours that are reported.
Dims    none.
Book    book/01_count.ipynb             Kernel  none
"""

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import islice

from minids.config import Config, preset
from minids.count import REPORTED_HOURS, Counts, binary, short
from minids.files.inventory import Inventory

_SHOWN = 3  # names of a long list


def table(
    cfg: Config,
    counts: Counts,
    tokens: float,
    tflops: float,
    usd: float,
    files: Mapping[str, Mapping[str, int]],
) -> str:
    """Return what a person reads: every count with its share, its unit and its convention."""
    rows = [("parameters, by part", "", "")]
    for name, n in counts.parts.items():
        rows.append((f"  {name}", f"{n:,}", f"{n / counts.total:6.2%}"))
    rows.append(("  total (routing biases included)", f"{counts.total:,}", short(counts.total)))
    if cfg.mtp_depth:
        rows.append(("  MTP modules, unique", f"{counts.mtp:,}", short(counts.mtp)))
        rows.append(
            ("  MTP modules, as stored", f"{counts.mtp_stored:,}", short(counts.mtp_stored))
        )
    rows.extend([("files, with MTP copies and block scales", "elements", "")] if files else [])
    for stored, n in files.items():
        rest = f"{n['tensors']:,} tensors, {n['bytes']:,} bytes"
        rows.append((f"  {stored}", f"{n['elements']:,}", rest))
    rows.append(("active parameters a token", "", ""))
    for name, n in counts.active.items():
        rows.append((f"  {name}", f"{n:,}", f"{short(n)}, {n / counts.total:.2%}"))
    rows.append(
        (
            "KV cache a token, BF16",
            f"{counts.cache_bytes:,} B",
            f"{counts.cache_elements:,} numbers",
        )
    )
    rows.append((f"FLOPs a token, {counts.seq_len:,} tokens of context", "", ""))
    rows.append(("  forward", f"{counts.flops_forward:,}", f"{short(counts.flops_forward)}"))
    rows.append(("  training", f"{counts.flops_training:,}", f"{short(counts.flops_training)}"))
    rows.append(("memory to train the main model", "", "weights + master + gradients + optimiser"))
    for precision, sizes in counts.training_bytes.items():
        parts = " + ".join(binary(size) for size in sizes.values())
        rows.append((f"  {precision}", binary(sum(sizes.values())), parts))
    rows += _cost_rows(cfg, counts, tokens, tflops, usd)
    return _aligned(rows)


def _aligned(rows: list[tuple[str, str, str]]) -> str:
    left, middle = max(len(a) for a, _, _ in rows), max(len(b) for _, b, _ in rows)
    return "\n".join(f"{a:{left}}  {b:>{middle}}  {c}".rstrip() for a, b, c in rows)


def contents(held: Inventory) -> str:
    """Return what a person reads of a folder's files: what they hold, what is missing or wrong."""
    total = sum((Counter(size) for size in held.dtypes.values()), Counter())
    rows = [("really in the files", "elements", "")]
    for dtype, size in held.dtypes.items():
        rest = f"{size['tensors']:,} tensors, {size['bytes']:,} bytes"
        rows.append((f"  {dtype}", f"{size['elements']:,}", rest))
    rest = f"{total['tensors']:,} tensors, {total['bytes']:,} bytes"
    rows.append(("  all", f"{total['elements']:,}", rest))
    rows.append(("  files, with headers", f"{held.files:,}", f"{held.file_bytes:,} bytes"))
    lists: dict[str, Collection[str]] = {
        "missing files": held.missing_files,
        "damaged files": [f"{name} {problem}" for name, problem in held.damaged_files.items()],
        "missing tensors": held.missing,
        "unexpected tensors": held.unexpected,
        "wrong tensors": [f"{name} {problem}" for name, problem in held.wrong.items()],
    }
    for title, names in lists.items():
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            rows.append((f"  {title}", f"{len(names):,}", ", ".join(islice(names, _SHOWN)) + more))
    described = f"{held.expected:,} that config.json describes in {held.layout}"
    if held.missing:
        verdict = f"incomplete: {len(held.missing):,} tensors missing of the {described}"
    elif held.complete:
        verdict = f"complete: all tensors, the {described}"
    else:
        verdict = "not as it must be: load refuses this folder"
    return f"{_aligned(rows)}\n{verdict}"


def _cost_rows(
    cfg: Config, counts: Counts, tokens: float, tflops: float, usd: float
) -> list[tuple[str, str, str]]:
    hours = counts.gpu_hours(tokens, tflops)
    spent = f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"
    rows = [
        (f"training on {short(tokens)} tokens at {tflops:g} TFLOP/s", "", ""),
        ("  GPU-hours", spent, f"${usd * hours:,.2f} at ${usd:g} an hour"),
    ]
    if cfg == preset("v3"):
        told = sum(REPORTED_HOURS.values())
        rows.append(
            ("  reported (Table 1), with later stages", f"{told:,}", f"${2 * told:,} at $2")
        )
    return rows
