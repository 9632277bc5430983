"""Pure tensors: windows, attention, token mixers, modulation, embeddings, MLPs."""
