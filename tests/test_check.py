"""Exercises' machinery: verdicts, hints, solutions, comparisons, on exercises made for the test."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from minids import check, hint
from minids.learn import check as machinery
from minids.learn import solution
from minids.learn.check import Exercise, Property, differs, within


def is_double(answer):
    return differs("double(3)", answer(3), 6)


def takes_tensors(answer):
    return differs("double([1., 2.])", answer(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 4.0]))


DOUBLE = Exercise(
    name="double",
    title="Twice as much",
    statement="Return twice `x`.",
    start="def double(x):\n    raise NotImplementedError\n",
    properties=(Property("twice three is six", is_double), Property("tensors too", takes_tensors)),
    hints=("Add.", "Add x.", "Return x + x."),
    solution="def double(x):\n    return x + x\n",
    wrong={"the square": "def double(x):\n    return x * x\n"},
)
NAPKIN = Exercise(
    name="answer",
    title="An estimate",
    statement="How many?",
    start="answer = ...\n",
    properties=(Property("about a hundred", lambda n: within("the number", n, 90, 110)),),
    hints=("a", "b", "c"),
    solution="",
    wrong={},
)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """A chapter `planted` with two exercises, and no hint seen yet."""
    module = ModuleType("minids.learn.exercises.planted")
    module.EXERCISES = (DOUBLE, NAPKIN)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(machinery, "chapters", lambda: ["planted"])
    monkeypatch.setattr(machinery, "_hints_seen", machinery.Counter())


@pytest.mark.parametrize("answer", [12, None, "double", torch.ones(2)])
def test_what_is_no_function_is_told_so(answer):
    verdict = check("planted.1", answer)
    assert not verdict
    assert "double must be a function, got" in repr(verdict)
    assert 'Give the function itself: check("planted.1", double).' in repr(verdict)


def test_scalars_of_numpy_are_numbers():
    assert differs("f()", np.int64(6), 6) is None
    assert differs("f()", np.float32(6.5), 6.5) is None
    assert "gave 7, expected 6" in differs("f()", np.int64(7), 6)
    assert "gave None, expected 0.123457: is a" in differs("f()", None, 0.1234567)


def test_right_answer_is_told_what_holds():
    verdict = check("planted.1", lambda x: x + x)
    assert verdict
    assert repr(verdict).startswith("✓ planted.1: right. 2 properties held:")
    assert "tensors too" in repr(verdict)


def test_wrong_answer_is_told_the_property_the_input_and_both_values():
    verdict = check("planted.1", lambda x: x * x)
    assert not verdict
    assert verdict.answered
    assert verdict.failed == "twice three is six"
    for part in ("twice three is six", "double(3) gave 9, expected 6", 'hint("planted.1")'):
        assert part in repr(verdict)


def test_later_property_says_how_many_held_before():
    def only_numbers(x):
        return 2 * x if isinstance(x, int) else x

    verdict = check("planted.1", only_numbers)
    assert verdict.failed == "tensors too"
    assert "at [0] gave 1, expected 2. \n" not in repr(verdict)
    assert "double([1., 2.]) at [0] gave 1, expected 2.\n  1 property before it held." in str(
        verdict
    )


def test_untouched_start_is_not_answered():
    namespace = {}
    exec(DOUBLE.start, namespace)
    for verdict in (check("planted.1", namespace["double"]), check("planted.2", ...)):
        assert not verdict
        assert not verdict.answered
        assert "not answered yet" in repr(verdict)


def test_exception_of_the_answer_is_told_with_its_line(tmp_path):
    path = tmp_path / "cell.py"
    path.write_text("def double(x):\n    return x.twice()\n")
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    verdict = check("planted.1", namespace["double"])
    assert verdict.failed == "twice three is six"
    assert "AttributeError: 'int' object has no attribute 'twice'" in repr(verdict)
    assert "in the line `return x.twice()`" in repr(verdict)


def test_reader_s_random_numbers_stay_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check("planted.1", lambda x: x + torch.rand(()).item())
    assert torch.equal(torch.rand(1), expected)


def test_interrupt_is_not_swallowed():
    def stopped(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("planted.1", stopped)


def test_hints_follow_each_other_and_the_last_stays():
    said = [repr(hint("planted.1")) for _ in range(4)]
    assert said[0] == "planted.1, hint 1 of 3: Add."
    assert said[1] == "planted.1, hint 2 of 3: Add x."
    assert said[2] == said[3] == "planted.1, hint 3 of 3: Return x + x."
    assert "hint 1" in hint("planted.2")


def test_solution_is_shown_or_said_to_be_left_out():
    assert "return x + x" in repr(solution("planted.1"))
    assert repr(solution("planted.2")) == (
        "planted.2: this copy leaves solutions out; your instructor has them."
    )


@pytest.mark.parametrize("which", ["planted.0", "planted.3", "planted", "planted.x", "planted.01"])
def test_unknown_exercise_says_which_there_are(which):
    with pytest.raises(
        ValueError, match=r"no exercise .*; this chapter has planted\.1, planted\.2"
    ):
        check(which, None)


def test_unknown_chapter_says_which_there_are():
    with pytest.raises(ValueError, match="no exercises for 'plonted'; there are some for planted"):
        hint("plonted.1")


# what a comparison says of a value that is not the wanted one
DIFFERENT = [
    (None, 3, "f gave None, expected 3: is a `return` missing?"),
    (4, 3, "f gave 4, expected 3."),
    (True, 1, "f gave True, expected 1."),
    ("3", 3, "f gave '3', expected 3."),
    (2.9999, 3.0, "f gave 2.9999, expected 3."),
    (math.nan, 3.0, "f gave nan, expected 3."),
    (70_273, 70_272, "f gave 70,273, expected 70,272."),
    ((1, 2), (1, 3), "f gave (1, 2), expected (1, 3)."),
    ([1, 2], (1, 2), "f gave [1, 2], expected (1, 2)."),
    (1, True, "f gave 1, expected True."),
    (3.0, torch.ones(2), "f gave 3, expected a tensor of shape [2]."),
    (torch.ones(3), torch.ones(2), "f has shape [3], expected [2]."),
    (torch.ones(2, dtype=torch.int64), torch.ones(2),
     "f has dtype torch.int64, expected torch.float32."),
    (torch.tensor([1, 5]), torch.tensor([1, 4]), "f at [1] gave 5, expected 4."),
    (torch.tensor([1.0, math.nan]), torch.ones(2), "f at [1] gave nan, expected 1."),
    (torch.tensor([-math.inf]), torch.tensor([math.inf]), "f at [0] gave -inf, expected inf."),
    (torch.tensor([[1.0, 2.1]]), torch.tensor([[1.0, 2.0]]), "f at [0, 1] gave 2.1, expected 2."),
]  # fmt: skip


@pytest.mark.parametrize(("got", "want", "said"), DIFFERENT)
def test_differs_says_how(got, want, said):
    assert differs("f", got, want) == said


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (3, 3),
        (3.0, 3),
        (torch.tensor(3), 3),
        (3.0000001, 3.0),
        ((1, "a"), (1, "a")),
        (torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf])),
        (torch.ones(2, dtype=torch.float64), torch.ones(2)),
        (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_differs_is_none_for_equals(got, want):
    assert differs("f", got, want) is None


def test_tolerance_is_relative_to_the_largest_value():
    want = torch.tensor([1000.0, 0.0])
    assert differs("f", torch.tensor([1000.0, 0.009]), want) is None
    assert differs("f", torch.tensor([1000.0, 0.011]), want) is not None


def test_within_does_not_tell_the_answer():
    assert within("the estimate", 100, 90, 110) is None
    assert within("the estimate", 1_234_567, 90, 110) == "the estimate is too large: 1.23457e+06."
    assert "too small" in within("the estimate", 1, 90, 110)
    assert within("the estimate", "100", 90, 110) == "the estimate must be a number, got '100'."
    assert "must be a number" in within("the estimate", True, 0, 2)
    assert within("the estimate", math.nan, 90, 110) is not None
