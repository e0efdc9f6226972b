"""What changes while a model trains: learning rate, batch, MTP weight and bias speed, over tokens.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2 (training hyper-parameters).
Dims    none; positions in a run are counted in trained tokens, batches in sequences.
Book    book/14_train.ipynb             Kernel  none
Differs the shape of the batch ramp is not disclosed: here equal stairs, each as high as the first.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from minids.config import Config


class Rates(NamedTuple):
    """What one optimiser step uses."""

    lr: float
    mtp_weight: float  # lambda of Eq. 25
    bias_speed: float  # gamma


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One run: a constant phase, a cosine and two constant tails, their lengths in tokens."""

    peak_lr: float
    warmup_steps: int
    constant: float  # from the first token on: the warm-up's tokens are part of it
    cosine: float
    tail: float
    last_tail: float
    cosine_end: float = 0.1  # of the peak: where the cosine arrives and the first tail stays
    last: float = 7.3e-6 / 2.2e-4  # of the peak
    batch: int  # sequences an optimiser step, once the ramp is over
    first_batch: int
    ramp: float = 0.0  # tokens
    late_mtp: float = 1 / 3  # of the MTP weight, after the constant phase: 0.3, then 0.1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type is int else 0
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name} must be a number >= {least}, got {value!r}")
        if not self.tokens or not self.peak_lr:
            raise ValueError(f"tokens and peak_lr must not be 0, got {self.tokens}, {self.peak_lr}")
        if self.batch % (first := self.first_batch):
            raise ValueError(
                f"batch must be a multiple of first_batch, got {self.batch} and {first}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return round(self.constant + self.cosine + self.tail + self.last_tail)

    def rates(self, cfg: Config, step: int, tokens: float) -> Rates:
        """Return the rates of optimiser step `step` (from 0), taken after `tokens` tokens."""
        peak = self.peak_lr * min(1.0, (step + 1) / self.warmup_steps)
        into_cosine = tokens - self.constant
        if into_cosine < 0:
            return Rates(peak, cfg.mtp_weight, cfg.bias_speed)
        late_mtp = cfg.mtp_weight * self.late_mtp
        if into_cosine < self.cosine:
            height = 0.5 * (1 + math.cos(math.pi * into_cosine / self.cosine))
            lr = peak * (self.cosine_end + (1 - self.cosine_end) * height)
            return Rates(lr, late_mtp, cfg.bias_speed)
        in_tail = into_cosine < self.cosine + self.tail
        return Rates(peak * (self.cosine_end if in_tail else self.last), late_mtp, 0.0)

    def batch_at(self, tokens: float) -> int:
        """Return the sequences of the step taken after `tokens` tokens."""
        stairs = self.batch // self.first_batch
        if tokens >= self.ramp:
            return self.batch
        return self.first_batch * (1 + int(tokens / self.ramp * (stairs - 1)))

    def scaled(self, tokens: int, *, peak_lr: float, warmup_steps: int, batch: int) -> "Schedule":
        """Return this shape for a run of `tokens`; a batch not divisible has no ramp."""
        part, stairs = tokens / self.tokens, self.batch // self.first_batch
        first, short = divmod(batch, stairs)
        lengths = {name: getattr(self, name) * part for name in _LENGTHS}
        return replace(self, peak_lr=peak_lr, warmup_steps=warmup_steps, batch=batch,
                       first_batch=batch if short else first, **lengths)  # fmt: skip


_LENGTHS = ("constant", "cosine", "tail", "last_tail", "ramp")
V3 = Schedule(peak_lr=2.2e-4, warmup_steps=2000, constant=10e12, cosine=4.3e12, tail=333e9,
              last_tail=167e9, batch=15_360, first_batch=3072, ramp=469e9)  # fmt: skip
