"""The testbed: generated scenes and two small VLMs trained on them."""
