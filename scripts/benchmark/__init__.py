"""The benchmark behind ``scripts/bench``: fio workloads over pmemfs and what it competes with.

``cells`` are the workloads, ``subjects`` and ``peers`` the things measured, ``backing`` and
``ext4`` what they are made of, ``places`` where in them a cell works, ``fio`` the one instrument,
``run`` the order of measurement, ``report`` and ``chart`` what is made of it, ``goals`` what is
wanted and ``verdicts`` what came of that. ``host`` knows the machine.
"""
