"""Door 3, edits: attention whose probabilities a method changes, at the speed of the model's own attention."""

from vlmfast.edits.call import Call
from vlmfast.edits.door import EditsDoor, attending_layers

__all__ = ["Call", "EditsDoor", "attending_layers"]
