"""What the card at hand can do, and a clear error where a kernel needs more.

Grid, layouts none: this file holds no kernel. Every wrapper calls `cards.card` first, by this full
name, so that tests can put another card in its place.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_LEAST = (8, 0)  # asynchronous copies and BF16 products
_FP8 = (8, 9)  # casts to E4M3 and products of E4M3 in hardware


class Card(NamedTuple):
    """One GPU, or Triton's interpreter in its place."""

    name: str
    capability: tuple[int, int]
    n_sm: int  # streaming multiprocessors
    shared_bytes: int  # shared memory that one program may use

    @property
    def fp8(self) -> bool:
        """Say whether E4M3 has instructions; else kernels decode it and multiply in BF16."""
        return self.capability >= _FP8


# few multiprocessors: persistent kernels then loop on small matrices too
INTERPRETER = Card("Triton's interpreter", (9, 0), n_sm=3, shared_bytes=227 * 1024)


def card(kernel: str, *tensors: Tensor) -> Card:
    """Return the card that holds these tensors; RuntimeError, naming `kernel`, if it cannot."""
    devices = {x.device for x in tensors}
    if interpreted() and {device.type for device in devices} <= {"cpu", "cuda"}:
        return INTERPRETER
    if len(devices) > 1:
        on = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{kernel}: all tensors must be on one GPU, got {on}")
    (device,) = devices
    if device.type != "cuda" or torch.version.cuda is None:
        raise RuntimeError(
            f"{kernel} runs on an NVIDIA GPU, got a tensor on {device}: move the model there, or "
            "choose impl='torch', which runs anywhere"
        )
    found = _properties(device)
    if found.capability < _LEAST:
        raise RuntimeError(
            f"{kernel} needs an NVIDIA GPU of compute capability {_dotted(_LEAST)} (Ampere) or "
            f"newer, got {found.name} with {_dotted(found.capability)}: choose impl='torch'"
        )
    return found


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), without a GPU."""
    return bool(triton.knobs.runtime.interpret)


@cache
def _properties(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    shared_bytes = found.shared_memory_per_block_optin
    capability = (found.major, found.minor)
    return Card(found.name, capability, found.multi_processor_count, shared_bytes)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
