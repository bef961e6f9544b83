"""Models: tree batches, the attention hook, one module per role, loading and saving."""
