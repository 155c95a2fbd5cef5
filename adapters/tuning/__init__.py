"""PEFT tuners that know where a VLM's language model is. Importing this makes PEFT know them (extra `train`).

from peft import get_peft_model
from vlmfast.adapters.tuning import LofitConfig

model = get_peft_model(model, LofitConfig())
"""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("tuners need PEFT: pip install 'vlmfast[train]'") from error

from vlmfast.adapters.tuning.ademvl import AdemVLConfig
from vlmfast.adapters.tuning.base import TunerConfig
from vlmfast.adapters.tuning.lofit import LofitConfig
from vlmfast.adapters.tuning.pill import PillConfig
from vlmfast.adapters.tuning.slime import SlimeConfig
from vlmfast.adapters.tuning.visual_lora import VisualLoraConfig

__all__ = ["TUNERS", "AdemVLConfig", "LofitConfig", "PillConfig", "SlimeConfig", "VisualLoraConfig"]

TUNERS: dict[str, type[TunerConfig]] = {
    config.method: config for config in (AdemVLConfig, LofitConfig, PillConfig, SlimeConfig, VisualLoraConfig)
}
