"""The benchmark behind ``scripts/bench``: workloads over pmemfs and what it competes with.

It has several parts, each with its instrument: ``cells``, ``subjects`` and ``run`` are I/O on files
and devices, with ``fio``; ``filecells``, ``folders`` and ``filerun`` are files that grow and
metadata, with ``files`` (and ``files.c``); ``mountrun`` is what a mount costs,
``restartrun`` what callers notice when its processes are killed. ``peers``,
``pmemfsmount``, ``backing`` and ``ext4`` are what subjects are made of, ``places`` where in them a
cell works, ``stage`` what parts have in common. ``report``, ``markdown`` and ``chart`` are what is
made of it, ``goals`` what is wanted and ``verdicts`` what came of that; ``parts`` lists all of it.
``host`` knows the machine.
"""
