"""The training step's loops for CPUs, compiled by numba: quantise → select → residual → rows.

`codes.py` and `rows.py` define the same arithmetic in plain torch; `compiled.py` calls these in its place.
What is done here, and why:

- `quantise`: rows rotated and rounded to 8 bits, for a product twice as fast as in bfloat16 and more.
- `select`: the k largest pre-activations. The 8-bit scores only say which latents need to be looked at;
  these are scored anew from the unrounded rows, so that the result is that of the whole product.
- `residual`: decoding, error and ⟨error, decoder row⟩, each decoder row fetched once into the cache.
- `rows`: the pairs (token, latent) by latent, and the gradients of a block of rows.

Every token and every latent is computed alone, so results do not depend on the number of threads. Rows
are float32 or bfloat16, which numba sees as 16-bit integers. The modules need numba; import them where
they are used, and only there.
"""
