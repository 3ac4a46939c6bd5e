"""I/O as the block layer describes it: lists of (pfn_t, length, offset).

The mount needs `bio_vec` alone. `kmap` and `transfer` are for what moves pages between the pool and
another device: a cache in front of it, and programs that pin pages.
"""
