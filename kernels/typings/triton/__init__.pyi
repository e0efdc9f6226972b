# Triton for the type checker. A kernel only looks like Python: its blocks are no Python values, and
# its call takes a grid and num_warps. So nothing inside kernels is checked; all around them is.
from collections.abc import Callable
from typing import Any, overload

@overload
def jit(fn: Callable) -> Any: ...
@overload
def jit(*, do_not_specialize: list[str]) -> Callable[[Callable], Any]: ...
def __getattr__(name: str) -> Any: ...
