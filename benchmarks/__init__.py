"""Commands that measure edgevl, beside other tools where that is possible. Run as `python -m benchmarks.NAME`.

Each prints a table for people and, last, one JSON document with the command, versions and machine.
"""
