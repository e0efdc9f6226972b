"""Benchmarks: each prints a table of ratios with the times, spreads and memory they come from."""
