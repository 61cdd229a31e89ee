"""A GPU in software, for machines without one."""
