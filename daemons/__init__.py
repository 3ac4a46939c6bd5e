"""The processes: each module parses, wires, runs and stops one. No module imports them."""
