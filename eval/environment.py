"""Where a number was measured: versions, machine, commit."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vlmfast.eval.models import AUTO

PACKAGES = ("torch", "transformers", "vlmfast", "numpy", "tokenizers", "accelerate", "torchvision")


def describe(device: str) -> dict[str, Any]:
    """Versions of what matters, CPU and device by name, commit of the source tree; None for what is not there."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "git_commit": _commit(Path(__file__).resolve().parent),
        "cpu": _cpu(),
        "device": _named(device),
        "platform": platform.platform(),
    }


def _named(device: str) -> str:
    """A device by its model; "auto": all that there are."""
    if device == AUTO:
        return " + ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "cpu"
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit the package runs from, "-dirty" behind it if a tracked file was changed; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy inside somebody else's repository is not ours
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    """The processor's name as the system gives it."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
