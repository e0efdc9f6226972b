"""Sizes of DeepSeek-V3: weights that are multiplied in FP8, outputs x inputs; its attention."""

from typing import NamedTuple

TOKENS = 4096  # of a training step, or of a prompt


class Weight(NamedTuple):
    """One linear layer, or two that read the same input."""

    name: str
    n: int  # outputs
    k: int  # inputs


WEIGHTS = (
    Weight("shared down", 7168, 2048),
    Weight("q_a + kv_a", 2112, 7168),
    Weight("kv_b", 32768, 512),
    Weight("shared gate + up", 4096, 7168),
    Weight("q_b", 24576, 1536),
    Weight("o", 7168, 16384),
    Weight("down", 7168, 18432),
    Weight("gate + up", 36864, 7168),
)


class Attention(NamedTuple):
    """Heads and widths of latent attention."""

    heads: int
    nope: int
    rope: int
    value: int
    latent: int

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


class Experts(NamedTuple):
    """Widths of routed experts."""

    dim: int
    hidden: int
    experts: int
    k: int  # of a token


V3_EXPERTS = Experts(dim=7168, hidden=2048, experts=256, k=8)
V3 = Attention(heads=128, nope=128, rope=64, value=128, latent=512)
