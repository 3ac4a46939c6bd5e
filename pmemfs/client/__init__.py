"""What `import pmemfs` gives a program: mounts, arrays over their pages, and pins.

`connection` talks to the daemon of a mount, `mount` is what `connect` answers, `mapping` has the
arrays and what keeps them, `newfile` a file that appears when it is complete, `pin` what holds the
pages, `pieces` how they lie side by side, and `memory` maps them. `connection`, `pieces` and
`memory` load no numpy.
"""
