"""The store as batches: batch i is a function of (seed, store, i).

kept.py          which rows the mask leaves
rows.py          which of these are trained on
epochs.py        in which order, over a whole store
loader.py        shards → a shuffling buffer → batches
feed.py          batches on the device, one ahead
scaling.py       the units of training

of a store that is still being filled:

following.py     in which order, group of shards after group
followed_rows.py which rows, with what is known of them before they are there
units.py         what the first shards decide, written down in the run

whole_rows.py    batches in whole rows of text, for losses of the model
order.py         what an order is
"""
