"""The benchmark behind ``scripts/bench``: fio workloads over pmemfs and what it competes with.

``cells`` are the workloads, ``subjects`` the things measured, ``fio`` the one instrument, ``run``
the order of measurement, ``report`` and ``chart`` what is made of it. ``host`` knows the machine.
"""
