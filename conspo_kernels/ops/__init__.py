"""The registered ops: schema, fake, autograd and choice of backend. Nothing else owns these."""
