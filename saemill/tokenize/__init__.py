"""Stage 1: documents become packed rows of token ids."""
