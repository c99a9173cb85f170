"""A step on a CPU.

backend.py  its passes, by
loops/      which numba compiles, and
threads.py  which share them out
product.py  which product is fastest here
update.py   from gradients to new weights
"""
