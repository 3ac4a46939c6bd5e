"""The mount: what the kernel asks, and who answers it."""
