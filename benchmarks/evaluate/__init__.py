"""Assessment beside other people's evaluations.

others.py        a run's figures beside SAELens', SAEBench's, sparsify's and dictionary_learning's

evaluators.py    the other packages' evaluations, in their own environment; it knows nothing of saemill
definitions.py   their figures by their definitions, from saemill's model pass and SAE
"""
