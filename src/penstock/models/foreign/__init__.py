"""Models whose layers are transformers' own: every causal language model that it builds and that is not native."""
