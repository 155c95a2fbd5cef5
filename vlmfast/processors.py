"""Load a processor whether or not torchvision is installed.

With torchvision this is ``AutoProcessor.from_pretrained``. torchvision has no CPU build, and the processors of
LLaVA's kind do well without it; those of Qwen-VL's kind insist on a video processor, which needs it. For them there
is a subclass without the video slot: pictures and text work as ever, videos do not.
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.utils import cached_file, is_torchvision_available

logger = logging.getLogger(__name__)
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_QWEN = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen-VL's processor without the video slot, for machines without torchvision.

    It saves its class as ``Qwen2_5_VLProcessor``, so that a saved folder opens as usual where torchvision is there.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")
        self.video_token = getattr(tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


# Saved folders name the class by __name__; pickling goes by __qualname__ and still finds this one.
ImageOnlyQwenProcessor.__name__ = "Qwen2_5_VLProcessor"


def load_processor(path_or_id: str | Path) -> Any:
    """The processor of a folder or Hub id, with what works on this machine."""
    source = str(path_or_id)
    config = _processor_config(source)
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source)
    if _wants_video(source, config):
        logger.warning("torchvision is missing: %s is read by a processor for pictures only, without videos", source)
        return _image_only(source)
    try:
        return AutoProcessor.from_pretrained(source)
    except ImportError as error:
        raise ImportError(f"the processor of {source} needs torchvision, which is not installed") from error


def _read(source: str, name: str) -> dict[str, Any] | None:
    """One of a model's JSON files, None where it has no such file."""
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text()) if found else None


def _processor_config(source: str) -> dict[str, Any]:
    """All processor files of a model in one dictionary."""
    merged: dict[str, Any] = {}
    for name in _FILES:
        merged |= _read(source, name) or {}
    if not merged:
        raise ValueError(f"{source} has no processor: none of {', '.join(_FILES)} is there")
    return merged


def _wants_video(source: str, config: dict[str, Any]) -> bool:
    """Whether it is a Qwen-VL processor, by its own word or by the model's."""
    if config.get("processor_class") in _QWEN:
        return True
    return (_read(source, "config.json") or {}).get("model_type") in ("qwen2_vl", "qwen2_5_vl")


def _image_only(source: str) -> ImageOnlyQwenProcessor:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(source)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(source)
    return ImageOnlyQwenProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
