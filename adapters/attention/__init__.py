"""Methods that redistribute attention."""
