"""Text out of language models: unconditional samples, as datasets of one size."""
