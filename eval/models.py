"""Models by name: `testbed:NAME`, a folder, or a Hugging Face id, loaded with their processor and hashed.

`NAME+adapter=FOLDER` is such a model with a PEFT adapter on it; names, hashes and files of results tell the adapter.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from vlmfast.eval import testbed
from vlmfast.families import FAMILIES
from vlmfast.processors import load_processor

AUTO = "auto"  # as a device: all there are, the model's parts shared out among them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
HASHED = (
    "config.json",
    "generation_config.json",
    *PROCESSOR_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
ADAPTER = "+adapter="  # between the name of a model and the folder of a PEFT adapter
FINETUNED = "vlmfast_finetune.json"  # what a fine-tuning run tells of itself
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TEXTS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # what is fetched from the hub


def model_folder(name: str) -> Path:
    """The local folder of a model without its adapter; a Hugging Face id is downloaded into the hub's cache first.

    ValueError for an unknown testbed model and for a folder that holds no vision-language model with its processor,
    NotImplementedError for a family vlmfast does not know, OSError if there is no such folder or id.
    """
    name, adapter = split_adapter(name)
    if adapter is not None:
        _check_adapter(adapter)
    if name.startswith("testbed:"):
        known = [f"testbed:{known}" for known in testbed.MODELS]
        if name not in known:
            raise ValueError(f"unknown testbed model {name!r}; there are {', '.join(known)}")
        folder = testbed.folder(name.removeprefix("testbed:"))
    else:
        folder = Path(name).expanduser()
        if not folder.exists():
            folder = _download(name)
    _check(name, folder)
    return folder


def split_adapter(name: str) -> tuple[str, Path | None]:
    """The name of a model alone, and the folder of its adapter."""
    name, found, folder = name.partition(ADAPTER)
    return name, Path(folder).expanduser() if found else None


def with_adapter(name: str, folder: str | Path | None) -> str:
    """The name of a model with an adapter on it; ValueError for a second one."""
    if folder is None:
        return name
    if ADAPTER in name:
        raise ValueError(f"{name} names an adapter already")
    return f"{name}{ADAPTER}{folder}"


def _check_adapter(folder: Path) -> None:
    """Raise unless the folder holds a PEFT adapter."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of an adapter {folder}")
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is no PEFT adapter: it has no {file}")


def _download(name: str) -> Path:
    """The hub's copy of a model; OSError tells why there is none."""
    from huggingface_hub import snapshot_download

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no model folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(TEXTS)))
    except (OSError, ValueError) as error:  # every error of the hub is one of the two
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{name} is neither a folder nor a model that the Hugging Face hub gives us: {reason}") from None


def _check(name: str, folder: Path) -> None:
    """Raise unless the folder holds a vision-language model of a known family, its weights and its processor."""
    if not folder.is_dir():
        raise NotADirectoryError(f"the model {name} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"the model folder {folder} has no config.json: it was not made with save_pretrained")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is not the configuration of a model") from None
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{name} is a {kind!r} model, which takes no images; vlmfast supports {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        raise NotImplementedError(f"{name} is of the family {kind!r}; vlmfast supports {', '.join(FAMILIES)}")
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        raise ValueError(f"the model folder {folder} has no processor: put one there with processor.save_pretrained")
    if not weight_files(folder):
        raise ValueError(f"the model folder {folder} has no weights (*.safetensors)")


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model, sorted."""
    return sorted(folder.glob("*.safetensors"))


def model_hash(folder: Path, adapter: Path | None = None) -> str:
    """Changes with the weights, the configuration, the processor, the tokenizer, the chat template or the adapter."""
    digest = hashlib.sha256()
    files = [folder / file for file in HASHED if (folder / file).is_file()] + weight_files(folder)
    for path in files + ([] if adapter is None else [adapter / file for file in ADAPTER_FILES]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load_model(
    name: str, *, device: str = "cpu", dtype: str = "float32", device_map: Any = None, attention: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode on the device, and its processor; errors as in `model_folder`.

    device_map: where transformers puts the parts, instead of the device; a device of "auto" is a map of that name.
    Where inputs of such a model belong `vlmfast.patching.entrance` tells. attention: `attn_implementation`. With an
    adapter it is the same transformers model with PEFT's layers in it; ImportError without PEFT, ValueError for an
    adapter that does not fit the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    target = check_device(device)
    if device == AUTO and device_map is None:
        device_map = AUTO
    folder = model_folder(name)
    with _quiet():
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=DTYPES[dtype], device_map=device_map, attn_implementation=attention
        )
    base, adapter = split_adapter(name)
    if adapter is not None:
        model = _adapted(model, base, adapter)
    return (model if device_map is not None else model.to(target)).eval(), load_processor(folder)


def _check_base(name: str, folder: Path) -> None:
    """ValueError if the folder tells that its adapter was trained on other weights."""
    if (folder / FINETUNED).is_file():
        run = json.loads((folder / FINETUNED).read_text(encoding="utf-8"))
        if run["model_hash"] != model_hash(model_folder(name)):
            raise ValueError(f"the adapter {folder} was trained on {run['model']}, not on the weights of {name}")


def _adapted(model: Any, name: str, folder: Path) -> Any:
    """The model of this name with an adapter in it."""
    import vlmfast.adapters.tuning  # noqa: F401  makes PEFT know vlmfast's own tuners, or says that it is not there

    _check_base(name, folder)
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder)).get_base_model()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the adapter {folder} does not fit {type(model).__name__}: {reason}") from error


def check_device(device: str) -> torch.device:
    """The device of this name; ValueError if torch does not know it or it is not there.

    Of "auto" the first one, where inputs go; ModuleNotFoundError without accelerate, which shares models out.
    """
    if device == AUTO:
        import accelerate  # noqa: F401  told by name where it is missing

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # unknown name; a CPU build of torch asserts
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the device {device!r} cannot be used here: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that transformers draws while it loads weights: they would cut through ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
