"""A sandbox of two processes: one runs untrusted code, the other its tests, and neither sees the other's memory.

The trainer imports `pool` (and through it `verdict`); `zygote` and what it imports run in the sandboxed interpreters,
which load this folder alone, under the name `sandbox`: those modules import nothing but the standard library.
"""
