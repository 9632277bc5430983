"""Images, the VAE codec, latent shards and the order in which training sees them."""
