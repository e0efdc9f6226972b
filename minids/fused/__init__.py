"""References of kernels that do in one pass what is said here step by step."""
