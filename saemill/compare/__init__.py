"""Dictionaries beside one another: what two SAEs have in common, latent by latent."""
