"""SAEs in training.

learner.py    one: its parameters, optimizer, dead latents and sums
totals.py     what a learner's steps came to
bank.py       those of one site, stepped over one batch
"""
