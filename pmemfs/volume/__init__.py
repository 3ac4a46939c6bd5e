"""Volumes: what a pool serves. Each maps a range of bytes of an inode to page frames."""
