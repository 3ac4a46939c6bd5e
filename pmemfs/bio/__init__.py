"""I/O as the block layer describes it: lists of (pfn_t, length, offset)."""
