"""Building blocks that the model files share; each declares the checkpoint tensors that fill its parameters."""
