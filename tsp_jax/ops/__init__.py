"""Pure per-device functions: arrays in, arrays out, mesh axes as keywords. Run them inside `jax.shard_map`.

stream, stationary   move weights past tokens, or tokens past weights, over folded axes
pipeline, chunks     the loop that overlaps communication, and the loop that bounds activation memory
sequence             all-gather and reduce-scatter over sequence axes
rowwise              ops that sum over rows of their weights: mlp, embedding, experts
router, grouped      which experts each token goes to, and products of tokens grouped by expert
cross_entropy        the output head and the loss
attention, kernels   attention for training, prefill and decoding, and its kernels
linear, norm, rope   arithmetic of one device
reference            the unsharded mathematics of every op
"""
