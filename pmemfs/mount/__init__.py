"""Mounts as the system sees them: their options and places, how they are made and taken away, what
their processes may use, and which transport this kernel has.

Knows neither pools nor requests, and loads neither trio nor pyfuse3: the commands need it as much
as the daemon.
"""
