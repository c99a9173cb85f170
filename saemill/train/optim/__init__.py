"""Optimizers that step a block of rows.

optimizer.py    what an optimizer does; Adam and SGD
moments.py      Adam's moments between steps, in their formats
signum.py       sign steps with schedule-free averaging
muon.py         orthogonalised momentum of whole matrices
average.py      the weights' moving average
clipping.py     gradients of too large a norm
"""
