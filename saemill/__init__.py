"""saemill: cache transformer activations once, train many sparse autoencoders over them."""
