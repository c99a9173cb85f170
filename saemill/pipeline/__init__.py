"""Several stages as one: joined at the folders between them.

stages.py     the stages of a config, and the folders that join them
rows.py       whether there are enough rows
together.py   caching and training at once, in two processes
trainee.py    the one that trains
chain.py      all on this machine, each result found again by content
found.py      what each result is found by
config.py     the section run
run.py        `saemill run`: a model and a dataset, or a config
matrix.py     `saemill matrix`: models × datasets × seeds
summary.py    the results of a matrix
"""
