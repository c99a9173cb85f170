"""Text out of language models: unconditional samples, as datasets of one size.

config.py     the settings
run.py        `saemill generate`: some models → datasets
sampling.py   a model → a batch of samples, each of its own random numbers
dataset.py    batches → a parquet file, cut to a number of tokens
"""
