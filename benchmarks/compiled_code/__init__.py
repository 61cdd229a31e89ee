"""Reading the machine code of compiled kernels."""
