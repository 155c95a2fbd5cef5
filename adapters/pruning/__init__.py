"""Visual-token pruning before the language model."""
