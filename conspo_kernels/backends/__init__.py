"""The backends that run ops: a folder or a module each, with the functions of `contract.py`; see `registry.py`."""
