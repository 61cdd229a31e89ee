"""The registered ops: schema, fake, autograd and choice of backend. Nothing else owns these."""

from ..backends.registry import check_implementation

__all__ = ["check_implementation"]
