"""Tensor operations, in place where possible, on one process or any number of ranks."""
