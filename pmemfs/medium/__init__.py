"""The memory itself: how it is opened, locked, mapped, written and made durable."""
