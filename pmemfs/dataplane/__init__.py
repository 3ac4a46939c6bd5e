"""The data plane: what serves the kernel without Python, and what both planes share."""
