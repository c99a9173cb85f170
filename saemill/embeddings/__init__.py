"""Embeddings that were computed elsewhere, or are computed here: another way into an ActivationStore."""
