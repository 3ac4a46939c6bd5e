"""I/O in the terms of the block layer: lists of (pfn_t, length, offset)."""
