"""Several stages as one: joined at the folders between them.

stages.py     the stages of a config, and the folders where they meet
rows.py       whether there are rows enough
chain.py      all on this machine, each result found again by content
run.py        `saemill run`: a model and a dataset, or a config
matrix.py     `saemill matrix`: models × datasets × seeds
summary.py    what they come to
"""
