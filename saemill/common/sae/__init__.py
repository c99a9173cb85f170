"""An SAE that can be used, and its files.

parts.py      shape, provenance and tensors
topk.py       the k largest of a row, exactly
above.py      those above their thresholds
sae.py        Sae: encode, decode, save, load
formats/      as files: saemill's, and other tools'
of_run.py     in the folder of the run that trained it
"""
