"""The cache: how fast it is written, and how fast training reads it.

forward.py    caching beside the bare forward pass and SAELens' runner (saelens_runner.py)
loader.py     the training loader beside plain sequential reads, and how well its batches mix
following.py  how batches mix that are read while the store is filled, and what SAEs lose by it
forms.py      int8 and compressed stores: bytes, and the loader beside plain reads of raw ones

store.py      the store that it reads, whose rows hold their addresses
mixing.py     figures of how batches mix
"""
