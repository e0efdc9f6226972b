"""DeepSeek-V3 from nothing: short enough to read, exact enough to load the published weights."""

from minids.checkpoint import load, save
from minids.config import PRESETS, Config, preset
from minids.model import Transformer

__all__ = ["PRESETS", "Config", "Transformer", "load", "preset", "save"]
