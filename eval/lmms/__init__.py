"""lmms-eval: vlmfast as a model there, and its tasks here.

`lmms-eval --model vlmfast --model_args pretrained=ID,method=hiprune:keep=0.33 --tasks pope` finds the model by the
entry point `manifest`; `vlmfast eval --task lmms:pope` goes through `vlmfast.eval.lmms.runner`. lmms-eval is an extra:
nothing of it is imported before it is needed.
"""

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval's group of entry points `lmms_eval.models` wants: where its model `vlmfast` is found.

    The chat model answers; multiple-choice and likelihood tasks, which lmms-eval builds for simple models alone, go
    through the simple one (`--force_simple`).
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlmfast",
        simple_class_path="vlmfast.eval.lmms.model.VlmfastSimple",
        chat_class_path="vlmfast.eval.lmms.model.Vlmfast",
    )
