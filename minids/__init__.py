"""DeepSeek-V3 from nothing: short enough to read, exact enough to load the published weights."""

from minids.checkpoint import load, save
from minids.config import PRESETS, Config, preset
from minids.count import count
from minids.evaluate import evaluate
from minids.generate import generate
from minids.learn.check import check, hint
from minids.model import Transformer
from minids.train import train

__all__ = [
    "PRESETS",
    "Config",
    "Transformer",
    "check",
    "count",
    "evaluate",
    "generate",
    "hint",
    "load",
    "preset",
    "save",
    "train",
]
