"""The store as batches: batch i is a function of (seed, store, i).

rows.py       which rows are trained on
loader.py     shards → a shuffling buffer → batches
feed.py       batches on the device, one ahead
scaling.py    the units of training
"""
