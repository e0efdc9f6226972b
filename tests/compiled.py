"""Compile kernels for a GPU that is not here, through the wrappers that launch them.

A subprocess (Triton must not interpret in it) puts a stand-in for the driver in place, calls
launches on tensors without memory (device "meta"), and reads registers, spills, shared memory and
instructions off what ptxas made. Nothing runs; what is asserted is what a GPU would load.

    def launch(rows, config):  # in the test file, of a wrapper
        quantise(torch.empty(rows, 7168, device="meta"), config=Config(**config))

    @pytest.fixture(scope="module")
    def compiled():  # one subprocess a test file and card: starting it takes longer than a kernel
        return compile_calls("test_kernel_x", "launch", [{"rows": 4096, "config": {...}}, ...])
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent


class Model(NamedTuple):
    """A GPU to compile for; shared memory by the CUDA guide's table of compute capabilities."""

    name: str
    n_sm: int
    shared_bytes: int  # that one program may use; 1 KiB more is the system's
    warps: int  # on one multiprocessor


# Ampere (no FP8: operands become BF16), Ada, Hopper, Blackwell of the data centre and of the desk
CARDS = {
    (8, 0): Model("NVIDIA A100", 108, 163 * 1024, 64),
    (8, 9): Model("NVIDIA L40S", 142, 99 * 1024, 48),
    (9, 0): Model("NVIDIA H100", 132, 227 * 1024, 64),
    (10, 0): Model("NVIDIA B200", 148, 227 * 1024, 64),
    (12, 0): Model("NVIDIA RTX 5090", 170, 99 * 1024, 48),
}
HOPPER = (9, 0)
_SYSTEMS_BYTES = 1024  # of shared memory, for each program
_REGISTERS, _QUARTERS = 65536, 4  # of a multiprocessor; a warp lives in one quarter of it
_UNIT = 256  # registers are given to a warp in multiples of this
# matrix products (wgmma: QGMMA of FP8, HGMMA of BF16), bulk tensor copies, copies, spills; loads
# and stores with their width: LDG.128 is 16 bytes a thread, LDG 4 or less
_SASS = r"\b(QGMMA|HGMMA|QMMA|HMMA|UTC\w*MMA|UTMALDG|UTMASTG|LDGSTS|STL|LDL|LDG|STG)\b([.\w]*)"
_MOVES = {"LDG", "STG"}
_INEXACT = r"^\s+(?:@!?%p\d+ )?(\w+\.(?:approx|full)[\w.]*)"  # such as div.full.f32 for `/`


class Compiled(NamedTuple):
    """One launch, as ptxas left it."""

    kernel: str  # name of the @triton.jit function
    warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: stack and local memory
    shared_bytes: int  # of a program
    instructions: dict[str, int]  # those of _SASS and how often they occur
    inexact: dict[str, int]  # PTX instructions that do not round to nearest, as often
    capability: tuple[int, int]

    @property
    def programs_on_an_sm(self) -> int:
        """Return how many programs run on one multiprocessor at a time."""
        model = CARDS[self.capability]
        of_a_warp = -(-self.registers * 32 // _UNIT) * _UNIT
        warps = min(_QUARTERS * (_REGISTERS // _QUARTERS // of_a_warp), model.warps)
        shared = model.shared_bytes + _SYSTEMS_BYTES
        return min(warps // self.warps, shared // (self.shared_bytes + _SYSTEMS_BYTES))


def compile_calls(
    module: str, function: str, calls: Sequence[dict[str, Any]], capability=HOPPER
) -> list[list[Compiled]]:
    """Call `function` of a test module with each of `calls`; return the launches of each call.

    Arguments travel as JSON. AssertionError, with the call and the compiler's words, where one
    does not compile, wants more shared memory than the card has, or launches nothing.
    """
    job = json.dumps([module, function, list(calls), capability])
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-W", "error::UserWarning", __file__, job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, f"{module}.{function} did not compile:\n{done.stderr[-4000:]}"
    launches = json.loads(done.stdout.splitlines()[-1])
    return [
        [Compiled(*fields[:-1], capability=tuple(fields[-1])) for fields in call]
        for call in launches
    ]


def main(job: str) -> None:
    module, function, calls, capability = json.loads(job)
    launched = stand_in(tuple(capability))
    launch = getattr(__import__(module), function)
    found = []
    for call in calls:
        launched.clear()
        try:
            launch(**call)
            assert launched, "no kernel was launched"
        except Exception as error:
            card = CARDS[tuple(capability)].name
            raise RuntimeError(f"{function}(**{call}) for {card}: {error}") from error
        found.append([_read(name, kernel, capability) for name, kernel in launched])
    print(json.dumps(found))


def stand_in(capability: tuple[int, int]) -> list[tuple[str, Any]]:
    """Let this process compile for a card that is not here; the list fills with its launches."""
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

    model = CARDS[capability]
    card = cards.Card(model.name, capability, model.n_sm, model.shared_bytes)
    launched, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= model.shared_bytes, (
            f"{self.__name__} wants {kernel.metadata.shared} bytes of shared memory, "
            f"{model.name} has {model.shared_bytes}"
        )
        launched.append((self.__name__, kernel))
        return kernel

    driver.set_active(Driver())
    JITFunction.run, cards.card = compile_only, lambda kernel, *tensors: card
    return launched


def _read(name: str, kernel, capability: tuple[int, int]) -> Compiled:
    usage = _tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
    numbers = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK", "LOCAL"))
    registers, stack, local = (int(found[1]) if found else -1 for found in numbers)
    assert registers > 0, f"cuobjdump does not say how many registers {name} uses:\n{usage}"
    ptx = kernel.asm["ptx"]
    threads = re.search(r"\.reqntid (\d+)", ptx)  # more than num_warps where warps specialise
    warps = int(threads[1]) // 32 if threads else kernel.metadata.num_warps
    sass = Counter(
        name + "".join(width for width in (".128", ".64") if name in _MOVES and width in suffix)
        for name, suffix in re.findall(_SASS, _tool("nvdisasm", "-c", kernel.asm["cubin"]))
    )
    inexact = Counter(re.findall(_INEXACT, ptx, re.MULTILINE))
    shared = kernel.metadata.shared
    spilled = stack + local
    return Compiled(name, warps, registers, spilled, shared, dict(sass), dict(inexact), capability)


def _tool(program: str, option: str, cubin: bytes) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, program).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, option, file.name], capture_output=True, text=True)
    assert done.returncode == 0, f"{program} failed: {done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
