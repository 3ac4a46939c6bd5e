"""Transformations of what files hold: the keys and ciphers, and the compressors."""
