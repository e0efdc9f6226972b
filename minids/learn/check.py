"""Exercises that check themselves: a wrong answer learns which property failed, on which input.

`minids/learn/exercises/<stem>.py` holds the exercises of a chapter, `check`, `hint` and `solution`
are what a reader types. Nothing here raises for a wrong answer: an untouched chapter runs through.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from traceback import extract_tb
from typing import Any

import torch

_hints_seen: Counter[str] = Counter()  # hint(id) again gives the next one


@dataclass(frozen=True)
class Property:
    """What must hold of an answer; `test` returns None, or a sentence with the input that fails."""

    name: str
    test: Callable[[Any], str | None]


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise; `start`, `solution` and each of `wrong` are sources that define `name`."""

    name: str
    title: str
    statement: str
    start: str
    properties: tuple[Property, ...]
    hints: tuple[str, ...]  # from gentle to plain
    solution: str
    wrong: dict[str, str]  # what is wrong with it -> source
    picture: Callable[[Any], str] | None = None  # HTML that a notebook shows for an answer


class Text(str):
    """Text that a notebook shows as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `check` found: true in a condition if the answer is right; shown as its text."""

    text: str
    right: bool
    answered: bool = True
    failed: str | None = None  # name of the first property that does not hold
    picture: Callable[[], str] | None = None  # drawn where a notebook shows it

    def _repr_html_(self) -> str | None:
        told = f'<pre style="white-space: pre-wrap">{escape(self.text)}</pre>'
        return self.picture and told + self.picture()

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text


def check(which: str, answer: Any) -> Verdict:
    """Check an answer to exercise `which`, such as "mla.2", and say what holds and what does not.

    ValueError only where there is no such exercise.
    """
    exercise = find(which)
    verdict = _judge(which, exercise, answer)
    drawn = partial(exercise.picture, answer) if exercise.picture else None
    return replace(verdict, picture=drawn)


def _judge(which: str, exercise: Exercise, answer: Any) -> Verdict:
    if answer is ...:
        return _unanswered(which)
    if f"def {exercise.name}(" in exercise.start and not callable(answer):
        return _no_function(which, exercise.name, answer)
    for number, required in enumerate(exercise.properties):
        try:
            # the same numbers each time, and the reader's own generator stays as it was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                trouble = required.test(answer)
        except NotImplementedError:
            return _unanswered(which)
        except Exception as error:
            trouble = _raised(error, exercise.name)
        if trouble:
            held = f"{_n_properties(number)} before it held. " if number else ""
            text = f"✗ {which}: not yet. This must hold: {required.name}.\n  {trouble}\n"
            text += f'  {held}hint("{which}") helps.'
            return Verdict(text, right=False, failed=required.name)
    names = "".join(f"\n  - {required.name}" for required in exercise.properties)
    n = _n_properties(len(exercise.properties))
    return Verdict(f"✓ {which}: right. {n} held:{names}", right=True)


def hint(which: str) -> Text:
    """Return the next hint for an exercise: three, from gentle to plain; the last one stays."""
    hints = find(which).hints
    number = min(_hints_seen[which], len(hints) - 1)
    _hints_seen[which] += 1
    return Text(f"{which}, hint {number + 1} of {len(hints)}: {hints[number]}")


def solution(which: str) -> Text:
    """Return the worked solution of an exercise, where this copy of minids has it."""
    source = find(which).solution
    if not source:
        return Text(f"{which}: this copy leaves solutions out; your instructor has them.")
    return Text(f"# {which}, one solution\n{source}")


def find(which: str) -> Exercise:
    """Return an exercise by its name, "<chapter>.<number>"; ValueError says which there are."""
    stem, _, number = which.partition(".")
    exercises = chapter(stem)
    if number not in {str(n) for n in range(1, len(exercises) + 1)}:
        names = ", ".join(f"{stem}.{n}" for n in range(1, len(exercises) + 1))
        raise ValueError(f"no exercise {which!r}; this chapter has {names}")
    return exercises[int(number) - 1]


def chapter(stem: str) -> tuple[Exercise, ...]:
    """Return the exercises of a chapter in order; ValueError for an unknown one."""
    if stem not in chapters():
        raise ValueError(f"no exercises for {stem!r}; there are some for {', '.join(chapters())}")
    return importlib.import_module(f"minids.learn.exercises.{stem}").EXERCISES


def chapters() -> list[str]:
    """Return the chapters that have exercises."""
    folder = importlib.import_module("minids.learn.exercises").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder))


def differs(call: str, got: Any, want: Any, tolerance: float = 1e-5) -> str | None:
    """Return None where `got` equals `want`, else a sentence; `tolerance` is relative, floats only.

    For tensors the error is measured against the largest wanted value.
    """
    if isinstance(want, torch.Tensor):
        wrong = _tensor_differs(got, want, tolerance)
    elif isinstance(want, float | int) and not isinstance(want, bool):
        wrong = _number_differs(got, want, tolerance)
    else:
        wrong = None if type(got) is type(want) and got == want else _got(got, want)
    return f"{call} {wrong}" if wrong else None


def within(what: str, got: Any, low: float, high: float) -> str | None:
    """Return None where `got` is a number from `low` to `high`, else a sentence without the answer.

    For napkin estimates: the range is wide, and its middle is computed and not told.
    """
    if isinstance(got, bool) or not isinstance(got, int | float):
        return f"{what} must be a number, got {got!r}."
    if low <= got <= high:
        return None
    side = "small" if got < low else "large"
    return f"{what} is too {side}: {got:,.6g}."


def _number_differs(got: Any, want: float, tolerance: float) -> str | None:
    if getattr(got, "ndim", None) == 0:  # a tensor or an array of one number, NumPy's scalars
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, int | float):
        return _got(got, want)
    exact = isinstance(want, int)
    near = got == want if exact else abs(got - want) <= tolerance * max(abs(want), 1e-12)
    return None if near else _got(got, want)


def _tensor_differs(got: Any, want: torch.Tensor, tolerance: float) -> str | None:
    if not isinstance(got, torch.Tensor):
        return _got(got, f"a tensor of shape {list(want.shape)}")
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, expected {list(want.shape)}."
    if want.dtype.is_floating_point != got.dtype.is_floating_point:
        return f"has dtype {got.dtype}, expected {want.dtype}."
    if want.dtype.is_floating_point:
        got, want = got.double(), want.double()
        if torch.equal(got.isfinite(), want.isfinite()):
            finite = want[want.isfinite()]
            scale = finite.abs().max().clamp_min(1e-12) if finite.numel() else 1.0
            wrong = ((got - want).abs() > tolerance * scale) & want.isfinite()
            wrong |= ~want.isfinite() & (got != want) & ~(got.isnan() & want.isnan())
        else:
            wrong = got.isfinite() != want.isfinite()
    else:
        wrong = got != want
    if not wrong.any():
        return None
    index = wrong.nonzero()[0].tolist()
    place = f"at {index} " if index else ""
    return f"{place}gave {got[tuple(index)].item():.6g}, expected {want[tuple(index)].item():.6g}."


def _got(got: Any, want: Any) -> str:
    if got is None:
        return f"gave None, expected {_shown(want)}: is a `return` missing?"
    return f"gave {_shown(got)}, expected {_shown(want)}."


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) and value.startswith("a tensor") else repr(value)


def _unanswered(which: str) -> Verdict:
    text = f'○ {which}: not answered yet. Write your answer above; hint("{which}") helps.'
    return Verdict(text, right=False, answered=False)


def _no_function(which: str, name: str, answer: Any) -> Verdict:
    text = f"✗ {which}: {name} must be a function, got {_shown(answer):.60}.\n"
    text += f'  Give the function itself: check("{which}", {name}).'
    return Verdict(text, right=False)


def _raised(error: Exception, name: str) -> str:
    """Say what the reader's code raised and in which line of it, without a traceback."""
    lines = [frame for frame in extract_tb(error.__traceback__) if frame.name == name]
    place = f" in the line `{lines[-1].line}`" if lines and lines[-1].line else ""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return f"It raised {type(error).__name__}: {message}{place}."


def _n_properties(n: int) -> str:
    return "1 property" if n == 1 else f"{n} properties"
