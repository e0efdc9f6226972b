"""Compile kernels for a GPU that is not here, through the wrappers that launch them.

Another process (Triton must not interpret in it) puts a stand-in for the driver in place, calls
launches on tensors without memory (device "meta"), and reads registers, spills, shared memory and
instructions off what ptxas made. Nothing runs; what is asserted is what a GPU would load.

Starting it takes longer than compiling a kernel, so one process imports what is needed, once for
all tests, and forks for each call of `compile_calls`: no job sees what another one did.

    def launch(rows, config):  # in the test file, of a wrapper
        quantise(torch.empty(rows, 7168, device="meta"), config=Config(**config))

    @pytest.fixture(scope="module")
    def compiled():  # all in one call: what is made of them is disassembled at once
        return compile_calls("test_kernel_x", "launch", [{"rows": 4096, "config": {...}}, ...])
"""

import atexit
import functools
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
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
_INSTRUCTION = 16  # bytes
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
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as folder:
        job = [module, function, list(calls), capability, list(map(os.path.abspath, sys.path))]
        compiler.stdin.write(json.dumps([folder, job]) + "\n")
        compiler.stdin.flush()
        status = compiler.stdout.readline().strip()
        words = Path(folder, "words").read_text() if Path(folder, "words").exists() else ""
        assert status == "0", f"{module}.{function} did not compile ({status}):\n{words[-4000:]}"
        launches = json.loads(Path(folder, "launches").read_text())
    return [
        [Compiled(*fields[:-1], capability=tuple(fields[-1])) for fields in call]
        for call in launches
    ]


@functools.cache
def _compiler() -> subprocess.Popen:
    """Start the process that compiles; it ends with this one."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-W", "error::UserWarning", __file__]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    compiler = subprocess.Popen(command, env=environment, text=True, cwd=HERE, **pipes)

    @atexit.register
    def end() -> None:
        compiler.stdin.close()
        compiler.wait()
        compiler.stdout.close()

    return compiler


def main() -> None:
    """Do the jobs whose lines come in, each in a process of its own; print how each ended."""
    torch.set_num_threads(1)  # threads would be missing in a fork
    for line in sys.stdin:
        folder, job = json.loads(line)
        module, *_, sys.path[:] = job
        with suppress(Exception):  # what fails is told by the fork
            importlib.import_module(module)
            _triton_key()
        child = os.fork()
        if not child:
            _forked(folder, *job[:-1])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _triton_key() -> None:
    """Let Triton hash its own files, a part of its cache's keys, before it is forked."""
    from triton.runtime.cache import triton_key

    triton_key()


def _forked(folder: str, *job) -> None:
    """Do a job; leave launches, or words and a status, and never return."""
    status = 1
    try:
        with open(Path(folder, "words"), "w") as words:
            os.dup2(words.fileno(), 2)  # the compiler's too, should it take this process with it
            os.dup2(2, 1)
        launches = compile_here(*job)
        Path(folder, "launches").write_text(json.dumps(launches))
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def compile_here(module: str, function: str, calls: list[dict], capability) -> list:
    launched = stand_in(tuple(capability))
    launch = getattr(importlib.import_module(module), function)
    found = []
    for call in calls:
        launched.clear()
        try:
            launch(**call)
            assert launched, "no kernel was launched"
        except Exception as error:
            card = CARDS[tuple(capability)].name
            raise RuntimeError(f"{function}(**{call}) for {card}: {error}") from error
        found.append(list(launched))
    kernels = {kernel.asm["cubin"]: kernel for call in found for _, kernel in call}
    sass = dict(zip(kernels, _disassembled(list(kernels), capability), strict=True))
    return [
        [_read(name, kernel, sass[kernel.asm["cubin"]], capability) for name, kernel in call]
        for call in found
    ]


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


def _read(name: str, kernel, sass: str, capability: tuple[int, int]) -> Compiled:
    usage = _tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    numbers = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK", "LOCAL"))
    registers, stack, local = (int(found[1]) if found else -1 for found in numbers)
    assert registers > 0, f"cuobjdump does not say how many registers {name} uses:\n{usage}"
    ptx = kernel.asm["ptx"]
    threads = re.search(r"\.reqntid (\d+)", ptx)  # more than num_warps where warps specialise
    warps = int(threads[1]) // 32 if threads else kernel.metadata.num_warps
    instructions = Counter(
        name + "".join(width for width in (".128", ".64") if name in _MOVES and width in suffix)
        for name, suffix in re.findall(_SASS, sass)
    )
    inexact = Counter(re.findall(_INEXACT, ptx, re.MULTILINE))
    shared = kernel.metadata.shared
    spilled = stack + local
    return Compiled(
        name, warps, registers, spilled, shared, dict(instructions), dict(inexact), capability
    )


def _disassembled(cubins: list[bytes], capability: tuple[int, int]) -> list[str]:
    """Return the instructions of each; nvdisasm takes long to start, so it gets all at once."""
    codes = [_code(cubin) for cubin in cubins]
    major, minor = capability
    card = f"SM{major}{minor}{'a' * (major >= 9)}"  # Triton compiles for these with all they have
    text = _tool("nvdisasm", b"".join(codes), "-b", card)
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*$", text, re.MULTILINE)
    assert len(lines) * _INSTRUCTION == sum(map(len, codes)), "nvdisasm left instructions out"
    lines = iter(lines)
    return ["\n".join(itertools.islice(lines, len(code) // _INSTRUCTION)) for code in codes]


def _code(cubin: bytes) -> bytes:
    """Return the machine code in a cubin, an ELF file: its sections .text.*."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * size) for n in range(count)]
    text = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", text + name)
    )


def _tool(program: str, binary: bytes, *options: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, program).path
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True)
    assert done.returncode == 0, f"{program} failed: {done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
