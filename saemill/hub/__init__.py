"""Runs and stores as repositories on the Hugging Face hub."""
