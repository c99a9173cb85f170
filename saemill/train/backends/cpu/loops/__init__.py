"""The training step's loops for CPUs, compiled by numba: quantise → select → residual → rows.

`arch/` defines the same arithmetic in plain torch; `backend.py` and `update.py` of `cpu/` call these loops.
What is done here, and why:

- `quantise`: rows rotated and rounded to 8 bits, for a product twice as fast as in bfloat16 and more.
- `bias`: what a product with x misses of one with x − b.
- `select`: the k largest pre-activations. The 8-bit scores only say which latents are candidates;
  these are scored anew from the unrounded rows, so that the result is that of the whole product.
- `residual`: decoding, error and ⟨error, decoder row⟩, each decoder row fetched once into the cache.
- `rows`: the pairs (token, latent) by latent, and the gradients of a block of rows.
- `auxk`: which activations and gradients of dead latents stay.

Every token and every latent is computed alone, so results do not depend on the number of threads. Rows
are float32 or bfloat16, which numba sees as 16-bit integers. What they share with other rooms is in
`common/loops`. The modules need numba; import them where they are used, and only there.
"""
