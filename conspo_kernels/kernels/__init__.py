"""The kernels: for every op one module per implementation, twins with the same signatures. Only `ops` calls them."""
