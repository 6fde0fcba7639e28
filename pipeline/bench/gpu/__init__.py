"""`make gpu`: builds, checks, times and trains on the GPU of this machine, step by step, and reports every figure.

`__main__` needs nothing but Python's standard library, so that it can say what is missing; each step is a process of
its own. docs/gpu.md is for the person who runs it.
"""
