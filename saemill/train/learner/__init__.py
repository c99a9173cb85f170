"""SAEs in training.

learner.py     one: its parameters, optimizer, dead latents and sums
resampling.py  dead latents that begin again
units.py       from training units to the activations' own
totals.py      sums over a learner's steps
bank.py        those of one site, stepped over one batch
"""
