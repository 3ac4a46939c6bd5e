"""Persistent memory as storage through FUSE, with a page structure for every page."""

from pmemfs.version import VERSION as __version__

__all__ = ["__version__"]
