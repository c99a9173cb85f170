"""The store as batches: batch i is a function of (seed, store, i).

rows.py       which rows are trained on
loader.py     shards → a shuffling buffer → batches
whole_rows.py  the same in whole rows of text, for losses of the model
feed.py       batches on the device, one ahead
scaling.py    the units of training
"""
