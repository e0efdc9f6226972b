"""Count a model before it exists: parameters, cache, FLOPs, memory, GPU-hours, money.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2, Table 1; FLOPs: arXiv:2505.09343, Tables 2, 4.
Dims    parameters are counts, sizes bytes, FLOPs multiply-adds times two.
Book    book/01_count.ipynb             Kernel  none
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from minids.config import Config
from minids.files.shards import FP8, tensor_names
from minids.model import Transformer

# bytes a parameter: (weights, master weights, gradients, both Adam moments); FP8 as report 3.3.3
TRAINING_BYTES = {"fp32": (4, 0, 4, 8), "bf16": (2, 4, 4, 8), "fp8": (1, 4, 4, 4)}
# H800 GPU-hours of the report's Table 1
REPORTED_HOURS = {"pre-training": 2_664_000, "context": 119_000, "post-training": 5_000}
REPORTED_TOKENS = 14.8e12
MEASURED_TFLOPS = 385.0  # causal, a GPU, in V3's training: arXiv:2505.09343, Table 4


@dataclass(frozen=True)
class Counts:
    """What `count` found; parameters include the routing biases, `parts` leaves out MTP."""

    parts: dict[str, int]
    mtp: int  # unique parameters of the MTP modules
    mtp_stored: int  # with the copies of embedding and head that the release stores
    active: dict[str, int]  # a token, by what counts of embedding and head
    cache_elements: int  # a token, all layers
    flops_forward: int  # a token, causal attention over `seq_len` tokens, mean over positions
    flops_training: int
    seq_len: int
    training_bytes: dict[str, dict[str, int]]  # of the main model, by precision

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes a token in BF16."""
        return 2 * self.cache_elements

    def gpu_hours(self, tokens: float, tflops: float) -> float:
        """Return GPU-hours to train on `tokens` at a sustained `tflops` (10^12 FLOP/s) a GPU."""
        for name, value in (("tokens", tokens), ("tflops", tflops)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        return tokens * self.flops_training / (tflops * 1e12 * 3600)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return asdict(self) | {"total": self.total, "cache_bytes": self.cache_bytes}


def attention_parameters(cfg: Config) -> int:
    """Count one attention layer with its latent norms."""
    d, heads, value = cfg.dim, cfg.n_heads, cfg.v_head_dim
    q_dim, out = heads * cfg.qk_head_dim, heads * value * d
    if cfg.attn != "mla":
        return d * q_dim + d * cfg.kv_heads * (cfg.qk_head_dim + value) + out
    q, c = cfg.q_lora_rank, cfg.kv_lora_rank
    queries = d * q + q + q * q_dim if q else d * q_dim
    down, up = d * (c + cfg.qk_rope_head_dim) + c, c * heads * (cfg.qk_nope_head_dim + value)
    return queries + down + up + out


def expert_parameters(cfg: Config) -> int:
    """Count one expert: three matrices."""
    return 3 * cfg.dim * cfg.moe_inter_dim


def count_parts(cfg: Config) -> dict[str, int]:
    """Count the main model's parameters by part, from formulas alone."""
    dense, moe = cfg.n_dense_layers, cfg.n_layers - cfg.n_dense_layers
    table, biased = cfg.vocab_size * cfg.dim, cfg.score_func == "sigmoid"
    return {
        "attention": cfg.n_layers * attention_parameters(cfg),
        "dense FFN": dense * 3 * cfg.dim * cfg.inter_dim,
        "shared experts": moe * cfg.n_shared_experts * expert_parameters(cfg),
        "routed experts": moe * cfg.n_routed_experts * expert_parameters(cfg),
        "gate matrices": moe * cfg.n_routed_experts * cfg.dim,
        "gate biases": moe * cfg.n_routed_experts if biased else 0,
        "norms": (2 * cfg.n_layers + 1) * cfg.dim,
        "embedding": table,
        "output head": table,
    }


def count_mtp(cfg: Config) -> int:
    """Count the unique parameters of all MTP modules: MoE layer, merge matrix, three norms each."""
    layer = count_parts(replace(cfg, n_layers=1, n_dense_layers=0))
    block = sum(layer.values()) - layer["embedding"] - layer["output head"] - cfg.dim
    return cfg.mtp_depth * (block + 2 * cfg.dim * cfg.dim + 3 * cfg.dim)


def count_active(parts: dict[str, int], cfg: Config) -> dict[str, int]:
    """Count what one token uses: K of E routed experts, all else, and the tables by convention."""
    used = parts["routed experts"] * cfg.n_activated_experts // cfg.n_routed_experts
    tables = parts["embedding"] + parts["output head"]
    neither = sum(parts.values()) - tables - parts["routed experts"] + used
    head = neither + parts["output head"]
    return {"with head": head, "with both tables": neither + tables, "with neither": neither}


def count(cfg: Config, seq_len: int | None = None) -> Counts:
    """Count a model from its config; attention is over `seq_len` (`original_seq_len`) tokens.

    FLOPs are 2 a multiply-add: forward 2 x active parameters (with head) plus attention over half
    of `seq_len` keys on average, training three times that (250.5 GFLOP a token for V3 at 4,096).
    """
    seq_len = cfg.original_seq_len if seq_len is None else seq_len
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    parts = count_parts(cfg)
    active, mtp, total = count_active(parts, cfg), count_mtp(cfg), sum(parts.values())
    a_key = 2 * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    forward = 2 * active["with head"] + cfg.n_layers * a_key * seq_len // 2
    names = ("weights", "master weights", "gradients", "optimiser")
    return Counts(
        parts=parts,
        mtp=mtp,
        mtp_stored=mtp + cfg.mtp_depth * (parts["embedding"] + parts["output head"]),
        active=active,
        cache_elements=cfg.n_layers * cfg.cache_dim,
        flops_forward=forward,
        flops_training=3 * forward,
        seq_len=seq_len,
        training_bytes={
            precision: {name: size * total for name, size in zip(names, sizes, strict=True)}
            for precision, sizes in TRAINING_BYTES.items()
        },
    )


def count_meta(cfg: Config) -> tuple[int, int]:
    """Count on the meta device: (main model, MTP modules), routing biases included."""
    with torch.device("meta"):
        model = Transformer(cfg)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


def count_files(cfg: Config) -> dict[str, dict[str, int]]:
    """Count tensors, elements and bytes of the published files of a MLA model, without headers.

    FP8 has a scale for each block of 128 x 128 and keeps BF16 and FP32 where the release does.
    """
    found = {"bf16": Counter(), "fp8": Counter()}
    for name, (shape, dtype) in tensor_names(cfg, FP8).items():
        formats = ["fp8"] if name.endswith("_scale_inv") else ["bf16", "fp8"]
        for stored in formats:
            width = 2 if stored == "bf16" and dtype == FP8 else dtype.itemsize
            n = math.prod(shape)
            found[stored] += Counter(tensors=1, elements=n, bytes=width * n)
    return {stored: dict(counted) for stored, counted in found.items()}


def short(n: float) -> str:
    """Return a count with three significant digits or more and K, M, B or T (powers of ten)."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if n >= 10**power:
            return f"{n / 10**power:.2f} {letter}"
    return f"{n:g}"


def binary(n_bytes: int) -> str:
    """Return bytes in the largest unit of KiB, MiB, GiB, TiB (powers of two) that fits."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 2**power:
            return f"{n_bytes / 2**power:.2f} {unit}"
    return f"{n_bytes} B"
