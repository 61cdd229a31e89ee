"""The gpu suite: its parts, the targets, and a dry run without a GPU."""
