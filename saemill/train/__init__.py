"""Stage 3: one shuffled stream of activations trains many SAE variants at once."""
