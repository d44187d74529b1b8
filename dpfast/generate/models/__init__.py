"""Networks that the sampler runs: denoisers, decoders, and the blocks inside them."""
