"""The methods, by the door they use into a model."""
