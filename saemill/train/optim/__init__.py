"""Optimizers that step a block of rows.

optimizer.py    Adam and SGD
moments.py      how Adam's moments are kept between steps
"""
