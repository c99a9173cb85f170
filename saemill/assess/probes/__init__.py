"""What can be read off an SAE's latents with a probe, and what hides a concept from it.

words.py        tokens that are whole words
examples.py     the tokens that probes are fitted to and tried on, in parts that share no word and no document
labels.py       what is to be told of an example: its source, its capital, its ending
codes.py        the examples' activations, and their latents in each dictionary
probe.py        logistic regression, and the area under its curve with an interval over groups
sparse.py       probes on k latents, beside a dense one, untrained dictionaries and shuffled labels
absorption.py   concepts that their own latents miss, since more special latents hold them
run.py          all of it, for the SAEs of a run
tables.py       what was found, as rows of text
"""
