"""Job `mla_decode`: a batch's next tokens attend to latents in pages, absorbed, as in serving."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import minids_kernels as kernels
from minids.serve.pages import Pages
from minids_kernels import latent
from minids_kernels.bench import attention_peers as peers
from minids_kernels.bench.attention import Queries, cached, decode_is_right
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare
from minids_kernels.bench.floors import latent_decode
from minids_kernels.bench.shapes import V3, Attention

JOB = "mla_decode"
ALL_HEADS = Goal("tflops", 430, instead=Goal("percent_of_copy", 85))
FEW_HEADS = Goal("tb_s", 2.5)  # those of V2-Lite, or of one GPU of eight
_MANY, _LONG = 16, 4096  # rows and latents from which the goals hold


class Batch(NamedTuple):
    """How many latents each row holds, heads, and new tokens a row."""

    lengths: tuple[int, ...]
    heads: int = V3.heads
    queries: int = 1

    @property
    def name(self) -> str:
        """Such as 128 x 4096, 16 heads; of rows that differ the least and the greatest length."""
        least, most = min(self.lengths), max(self.lengths)
        long = f"{least}" if least == most else f"{least} to {most}"
        queries = f", {self.queries} queries" if self.queries > 1 else ""
        return f"{len(self.lengths)} x {long}, {self.heads} heads{queries}"


def ragged(rows: int, mean: int) -> tuple[int, ...]:
    """Return lengths evenly between 0 and twice their mean, short beside long ones."""
    return tuple((2 * (7 * row % rows) + 1) * mean // rows for row in range(rows))


BATCHES = (
    *(Batch((n,) * rows, heads)
      for rows in (1, 32, 128) for n in (1024, 4096, 8192) for heads in (16, V3.heads)),
    Batch((4096,) * 32, queries=2),  # one of them drafted
    Batch(ragged(128, 4096)),
)  # fmt: skip
# compiling takes seconds: these stand for all
WITH_COMPILED = (Batch((4096,) * 128, 16), Batch((4096,) * 128))


def cases(
    batches: tuple[Batch, ...] = BATCHES,
    with_compiled: tuple[Batch, ...] = WITH_COMPILED,
    widths: Attention = V3,
) -> Iterator[Case]:
    """Yield the batches, small ones first."""
    work = {x: latent_decode(x.lengths, x.queries, widths._replace(heads=x.heads)) for x in batches}
    for batch in sorted(batches, key=lambda x: (work[x].operations, work[x].moved_bytes)):
        sizes = widths._replace(heads=batch.heads)
        sides: dict[str, Prepare] = {OURS: partial(ours, sizes)}
        sides |= {name: partial(peers.decode, way, sizes) for name, way in peers.SDPA.items()}
        sides[peers.EAGER] = partial(peers.absorbed, sizes)
        if batch in with_compiled:
            sides[peers.COMPILED] = partial(peers.absorbed_compiled, sizes)
            sides[peers.FLEX] = partial(peers.flex_decode, sizes)
        sides[peers.FLASHINFER] = partial(peers.flashinfer_decode, sizes)
        inputs = partial(cached, sizes, batch.lengths, batch.queries)
        check = partial(decode_is_right, sizes)
        yield Case(JOB, batch.name, work[batch], inputs, sides, check, goals(batch))


def goals(batch: Batch) -> tuple[Goal, ...]:
    """Return what is aimed at where the card is busy: with few latents the launch is the time."""
    mean = sum(batch.lengths) // len(batch.lengths)
    if len(batch.lengths) < _MANY or mean < _LONG:
        return ()
    return (ALL_HEADS if batch.heads == V3.heads else FEW_HEADS,)


def ours(sizes: Attention, of: Queries, pages: Pages) -> Call:
    """The kernel; its mask is the pages' own."""
    return partial(kernels.attend_latent, *of, latent.Pages(*pages), None, sizes.scale)
