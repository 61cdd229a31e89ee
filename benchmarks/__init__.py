"""Measurements of the kernels: on a GPU, on a CPU, and of the compiled code without either."""
