"""The memory itself: opened, locked, mapped, stored to, made durable."""
