"""Several stages as one: joined at the folders between them."""
