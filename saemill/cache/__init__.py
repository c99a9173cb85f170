"""Stage 2: the transformer runs once over the rows; its activations go to disk, shard by shard.

The path of a token, from its row to its shard:

run.py         the stage: a plan → a store with its tokens → its sites finished
fill.py        rows → model → activations → stored rows → a shard, until none is lacking
writer.py      a shard: permuted, written, hashed, summed, committed
spare.py       memory that shards share, one after another

What stands around it:

config.py      the settings
plan.py        the plan that follows from them, checked before the model is loaded
outlook.py     what will be written, and what that needs
folder.py      the store's folder: what is in it, and whether it is this store's
token_copy.py  the copy of its tokens that a store carries
calibration.py how a site's activations are spread, where they are stored as int8
names.py       whether a module holds what its name says
repair.py      which shards are bad, and what of them is mended without the model
recompute.py   bad shards computed again, to the bytes that they had
placing.py     how finished files get to their places, on a disk or in a bucket
sharing.py     which shard this process writes next, beside others
room.py        which shards may go when runs that follow the store have read them
claims/        which of many processes works on what
"""
