"""What a long run shows and hears: text, a bar, what it cost; Ctrl-C and SIGTERM.

Paper   none.
Dims    none.
Book    none                            Kernel  none
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time

import typer
from tqdm import tqdm

from minids.files.mapped import Mapped


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `code` is the exit code that tells which."""

    def __init__(self, code: int):
        super().__init__(signal.Signals(code - 128).name)
        self.code = code


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Note Ctrl-C and SIGTERM; the function it gives raises Stopped where stopping is safe.

    A second signal does not wait for that.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise Stopped(128 + number)
        came.append(number)

    def check() -> None:
        if came:
            raise Stopped(128 + came[0])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Screen:
    """The text on stdout, the bar on stderr.

    On a terminal whole lines of text go above the bar, and what follows them stands before it.
    """

    layers: int
    line: str = ""

    def __post_init__(self):
        self.on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        form = "{desc}{bar:20} {n_fmt}/{total_fmt} layers{postfix}"
        self.bar = tqdm(total=self.layers, leave=False, disable=None, bar_format=form)

    def text(self, new: str) -> None:
        if not self.on_terminal:
            typer.echo(new, nl=False)
            return
        *lines, self.line = (self.line + new).split("\n")
        for line in lines:
            tqdm.write(line)
        self.bar.set_description_str(f"{self.line[-40:]} ")

    def layer(self, done: int, about: str) -> None:
        self.bar.set_postfix_str(about, refresh=False)
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
        typer.echo(self.line, err=not self.on_terminal)  # stdout holds the text and no more


@dataclass
class Meter:
    """What tokens cost, in seconds and the processor's: the prompt's together, each new one's."""

    files: Mapped
    prompt: list[tuple[float, float, int]] = field(default_factory=list)  # and bytes
    words: list[tuple[float, float, int]] = field(default_factory=list)
    layer_seconds: dict[str, list[float]] = field(default_factory=lambda: {"dense": [], "MoE": []})

    def start(self, is_prompt: bool, whole: bool) -> None:
        """Begin a token; of one that is not run `whole`, behind a stop, no mean is taken."""
        self.costs = (self.prompt if is_prompt else self.words) if whole else []
        self.is_prompt, self.bytes_before = is_prompt, self.files.bytes_read
        self.began = self.layer_began = perf_counter()
        self.processor_began = process_time()

    def layer(self, kind: str) -> None:
        now = perf_counter()
        if not self.is_prompt:
            self.layer_seconds[kind].append(now - self.layer_began)
        self.layer_began = now

    def stop(self) -> None:
        seconds, processor = perf_counter() - self.began, process_time() - self.processor_began
        self.costs.append((seconds, processor, self.files.bytes_read - self.bytes_before))

    def line(self) -> str:
        """Return what stands behind the bar."""
        read = f"{self.files.bytes_read / 1e9:.1f} GB read"
        if not self.words:
            return read
        seconds = sum(cost[0] for cost in self.words)
        return f"{read}, {len(self.words) / seconds:.3g} tokens/s"

    def summary(self) -> str:
        """Return what the run cost, for a person."""
        parts = []
        for name, costs in (("prompt", self.prompt), ("a token", self.words)):
            if costs:
                sums = (sum(column) for column in zip(*costs, strict=True))
                seconds, processor, nbytes = (each / len(costs) for each in sums)
                busy = f"processor {processor:.2f} s"
                parts.append(f"{name}: {seconds:.2f} s ({busy}), {nbytes / 1e9:.2f} GB read")
        for kind, seconds in self.layer_seconds.items():
            if seconds:
                parts.append(f"{kind} layer: {sum(seconds) / len(seconds):.3f} s")
        parts.append(f"waited {self.files.seconds_waited:.1f} s for the disk")
        parts.extend([f"peak memory: {peak / 1e9:.2f} GB"] if (peak := peak_bytes()) else [])
        return "; ".join(parts)


def peak_bytes() -> int:
    """Return the most memory that was resident, 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
