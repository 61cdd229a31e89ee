"""What other packages and plain PyTorch do, each used as its authors mean it to be."""
