"""Parity with the authors' own code, through scripts/parity.py: every case of every set that has a method here."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import GOLDEN, ROOT

SCRIPT = ROOT / "scripts" / "parity.py"
spec = importlib.util.spec_from_file_location("parity", SCRIPT)
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

# Where the folder is absent (a user's clone) conftest.py says so in the summary; oracles and promises remain.
NAMES = sorted(parity.SETS) if GOLDEN.is_dir() else []


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_official_code(name):
    total, failures = parity.compare(GOLDEN, name)
    assert total > 0 and not failures, "\n".join(failures)


def test_a_wrong_selection_is_noticed(tmp_path, capsys):
    """The script must fail when an index differs: a copy of a set with one kept index changed."""
    import json

    import numpy as np
    import torch

    attention = torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(0))
    score = attention.mean(1)
    kept = score.topk(4).indices.sort().values
    case = {"case": "x", "hyper": {"kind": "image", "grid": [4, 4], "visual_token_num": 4}}
    (tmp_path / "fastervlm.json").write_text(json.dumps({"cases": [case]}))
    arrays = {"in_x_cls_attn": attention.numpy(), "out_x_score": score.numpy(), "out_x_kept": kept.numpy()}
    np.savez(tmp_path / "fastervlm.npz", **arrays)
    assert parity.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "fastervlm: 1/1\n"
    other = next(i for i in range(16) if i not in kept)
    np.savez(tmp_path / "fastervlm.npz", **(arrays | {"out_x_kept": np.array([[*kept[0, 1:].tolist(), other]])}))
    assert parity.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "fastervlm: 0/1\n"


def test_unusable_folders(tmp_path, capsys):
    assert parity.main([str(tmp_path / "none")]) == 2
    assert "no golden set" in capsys.readouterr().err
    (tmp_path / "hiprune.json").write_text('{"cases": [{"case": "x", "hyper": {}}]}')
    (tmp_path / "hiprune.npz").write_bytes(b"")
    assert parity.main([str(tmp_path), "hyprune"]) == 2
    assert "it has hiprune" in capsys.readouterr().err
    assert parity.main([str(tmp_path)]) == 2
    assert "unusable golden set" in capsys.readouterr().err
