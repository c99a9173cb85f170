"""Sums over many tokens in one pass, compiled by numba. Import them where they are used, and only there.

rows.py       how activations lie around a point, and around means
products.py   squares and products of activations and their reconstructions
counts.py     how the latents of an SAE fired
"""
