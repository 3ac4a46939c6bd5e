"""The mount: what the kernel asks, through pyfuse3."""
