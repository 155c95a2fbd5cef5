"""Methods that change what is generated from the logits."""
