"""What goes with the book: exercises that check themselves, figures that move, the guided tour."""

# `check` is left to its module: the package exports it as minids.check
from minids.learn.check import hint, solution
from minids.learn.widget import explore, live

__all__ = ["explore", "hint", "live", "solution"]
