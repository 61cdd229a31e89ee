"""Backends: what runs an op. Each is a folder, or one module, that offers what `contract.py` says; see `registry.py`."""
