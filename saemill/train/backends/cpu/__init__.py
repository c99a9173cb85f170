"""A step on a CPU: `compiled.py` strings together the `loops/`, which numba compiles."""
