"""The gradient check: `python -m conspo_kernels gradcheck`. See `command.py`; tolerances are in `tolerance.py`."""
