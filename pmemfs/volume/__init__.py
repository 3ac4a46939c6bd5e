"""Volumes: what a pool serves. A volume maps a range of bytes of an inode to page frames."""
