"""Run the command: `python -m minids_kernels.bench`."""

from minids_kernels.bench.command import app

app()
