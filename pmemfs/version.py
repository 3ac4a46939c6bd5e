"""The version of the software. The format on the pool has its own: `media.label.FORMAT_VERSION`."""

VERSION = "0.1.0"
