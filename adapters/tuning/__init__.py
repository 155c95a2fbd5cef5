"""PEFT tuners that know where a VLM's language model is. Importing this makes PEFT know them (extra `train`)."""

from vlmfast.adapters.tuning.lofit import LofitConfig

__all__ = ["LofitConfig"]
