"""The weights of DeepSeek-V3 that are multiplied in FP8, as outputs x inputs, in rising size."""

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
