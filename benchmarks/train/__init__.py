"""Training: saemill beside other trainers, and beside itself in other formats.

peers.py       one SAE: speed, memory, what is learned
members.py     every architecture beside the peers that have it, and all of them at once: speed, memory
quality.py     every architecture beside the peers that have it: what is learned, at equal L0
sweep.py       eight SAEs at once
precision.py   what short formats cost in FVU
stored_types.py  what int8 stores cost: errors, FVU, ΔCE
trees.py       another tree of saemill: the same bytes, the same speed

quality_tables.py  yardstick.py  equal_l0.py   what `quality` measures with and shows
rows.py        the rows that all contestants read
contest.py     the contestants, their runs as processes, and the cells of the tables
contestants/   one script per package
"""
