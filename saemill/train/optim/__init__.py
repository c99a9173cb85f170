"""Optimizers that step a block of rows.

optimizer.py    Adam and SGD
moments.py      Adam's moments between steps, in their formats
"""
