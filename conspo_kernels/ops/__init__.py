"""The registered ops: schema, fake, autograd and choice of implementation. Nothing else owns these."""
