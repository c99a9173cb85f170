"""A step on a CPU: `backend.py` and `update.py` run the `loops/`, which numba compiles, by `threads.py`."""
