"""Dictionaries beside one another: what two SAEs have in common, latent by latent.

config.py        the settings
run.py           `saemill compare`: all pairs
dictionaries.py  folders → SAEs, two by two
activations.py   SAEs → their codes on the same tokens
random_rows.py   what matches by chance
matching.py      similarities → nearest latents, and one-to-one
pair.py          a pair's figures
report.py        the table; the page, whose template is report.html
charts.py        where the marks of its charts are
"""
