"""What runs an op: each backend is a folder, or one module, that offers what `contract.py` says; see `registry.py`."""
