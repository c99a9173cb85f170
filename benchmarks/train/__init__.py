"""Training: saemill beside other trainers, and beside itself in other formats.

peers.py       one SAE: speed, memory, what is learned
sweep.py       eight SAEs at once
precision.py   what short formats cost in FVU
trees.py       another tree of saemill: the same bytes, the same speed

rows.py        the rows that all contestants read
contest.py     the contestants, their runs as processes, and the cells of the tables
contestants/   one script per package
"""
