"""A sandbox of two processes: one runs untrusted code, the other its tests, and neither sees the other's memory.

The trainer imports `pool`, which imports `worker`. `zygote` and what it imports run in the sandboxed interpreters,
which load this folder alone: those modules import nothing but each other and the standard library.
"""
