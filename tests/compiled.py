"""Compile kernels for a GPU that is not here, through the wrappers that launch them.

A subprocess (Triton must not interpret in it) puts a stand-in for the driver in place, calls
launches on tensors without memory (device "meta"), and reads registers, spills, shared memory and
matrix instructions off what ptxas made. Nothing runs; what is asserted is what a GPU would load.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
# Ampere (no FP8: operands become BF16), Ada, Hopper, Blackwell of the data centre and of the desk
CARDS = {
    (8, 0): ("NVIDIA A100", 108, 163 * 1024),
    (8, 9): ("NVIDIA L40S", 142, 99 * 1024),
    (9, 0): ("NVIDIA H100", 132, 227 * 1024),
    (10, 0): ("NVIDIA B200", 148, 227 * 1024),
    (12, 0): ("NVIDIA RTX 5090", 170, 99 * 1024),
}
HOPPER = (9, 0)


class Compiled(NamedTuple):
    """One launch, as ptxas left it."""

    kernel: str  # name of the @triton.jit function
    warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: stack and local memory
    shared_bytes: int  # of a program
    instructions: dict[str, int]  # QGMMA (wgmma of FP8), HGMMA, HMMA, UTMALDG (bulk tensor loads)

    @property
    def programs_on_an_sm(self) -> int:
        """Return how many programs fit on one multiprocessor of Hopper, by registers and memory."""
        by_registers = 65536 // (self.registers * 32 * self.warps)
        return min(by_registers, CARDS[HOPPER][2] // max(self.shared_bytes + 1024, 1))


def compile_calls(
    module: str, function: str, calls: Sequence[dict], capability: tuple[int, int] = HOPPER
) -> list[list[Compiled]]:
    """Call `function` of a test module with each of `calls`; return the launches of each call.

    Arguments travel as JSON. Raises RuntimeError with the compiler's words where one fails.
    """
    job = json.dumps([module, function, list(calls), capability])
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning:minids", __file__, job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f"{module}.{function} did not compile:\n{done.stderr[-4000:]}")
    launches = json.loads(done.stdout.splitlines()[-1])
    return [[Compiled(*fields) for fields in call] for call in launches]


def main(job: str) -> None:
    module, function, calls, capability = json.loads(job)
    sys.path.insert(0, str(HERE))
    with stand_in(tuple(capability)) as launched:
        launch = getattr(__import__(module), function)
        found = []
        for call in calls:
            launched.clear()
            launch(**call)
            found.append([_read(name, kernel) for name, kernel in launched])
    print(json.dumps(found))


@contextmanager
def stand_in(capability: tuple[int, int]) -> Iterator[list]:
    """Let wrappers compile for a card that is not here; yields (name, kernel) of each launch."""
    from minids_kernels import cards
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("meta")

    name, n_sm, shared_bytes = CARDS[capability]
    card = cards.Card(name, capability, n_sm, shared_bytes)
    launched, run, real = [], JITFunction.run, cards.card

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.metadata.shared > shared_bytes:
            raise RuntimeError(
                f"{self.__name__} wants {kernel.metadata.shared} bytes of shared memory, "
                f"{name} has {shared_bytes}"
            )
        launched.append((self.__name__, kernel))
        return kernel

    driver.set_active(Driver())
    JITFunction.run, cards.card = compile_only, lambda kernel, *tensors: card
    try:
        yield launched
    finally:
        JITFunction.run, cards.card = run, real
        driver.reset_active()


def _read(name: str, kernel) -> Compiled:
    usage = _tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    sass = _tool("nvdisasm", "-c", cubin=kernel.asm["cubin"])
    found = Counter(re.findall(r"\b(QGMMA|HGMMA|QMMA|HMMA|UTMALDG|LDGSTS|STL|LDL)\b", sass))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(name, warps, registers, stack + local, shared, dict(found))


def _tool(program: str, option: str, cubin: bytes) -> str:
    import tempfile

    from triton import knobs

    path = getattr(knobs.nvidia, program).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
