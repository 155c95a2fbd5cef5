"""The Triton kernels against full maps in fp64: under Triton's interpreter on a CPU, for real where a GPU is.

The interpreter and a GPU cannot share a process; with a GPU the tests marked `gpu` run the same grid on it, and
CUDA_VISIBLE_DEVICES= brings the interpreter back.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import bench_kernels
import pytest
import torch
from interpreter import GPU, VARIABLE, interpreting
from torch import Tensor

from vlmfast import kernels
from vlmfast.attention import column_mean
from vlmfast.edits import engine
from vlmfast.edits.engine import Seen

pytest.importorskip("triton")
with interpreting():
    from vlmfast.kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
INTERPRETED = pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="there is a GPU: -m gpu"))
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")])
FORMS = ("none", "bool", "additive", "by head", "causal", "padded", "window")
WIDTHS = (32, 64, 80, 128)
LENGTHS = ((1, 17), (17, 100), (100, 100), (197, 197))
TYPES = (torch.float32, torch.float16, torch.bfloat16)
CLOSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Fewer and larger blocks for fp32 than a GPU has registers for: the interpreter's time goes by blocks."""
    if not GPU:
        monkeypatch.setattr(launch, "FULL_SIZES", launch.HALF_SIZES)
    with interpreting():
        yield


@pytest.fixture
def device():
    return "cuda" if GPU else "cpu"


def views(form: str, batch: int, heads: int, n_query: int, n_key: int, device: str) -> Seen:
    """What queries may see, in every form; the first prompt's first two tokens are padding in some."""
    generator = torch.Generator().manual_seed(n_query + n_key)
    shape = (batch, heads if form == "by head" else 1, n_query, n_key + 3)  # a mask may be wider than the keys
    seen = torch.rand(shape, generator=generator) > 0.3
    seen[0, :, : n_query // 3] = False  # rows that see nothing
    places = n_key - n_query + torch.arange(n_query)
    keys = torch.ones(batch, n_key, dtype=torch.bool)
    keys[0, : n_key // 3] = False
    made = {
        "none": Seen(),
        "bool": Seen(mask=seen),
        "by head": Seen(mask=seen),
        "additive": Seen(mask=torch.zeros(shape).masked_fill(~seen, torch.finfo(torch.float32).min) + 0.25 * seen),
        "causal": Seen(places=places),
        "padded": Seen(places=places, keys=keys),
        "window": Seen(places=places, keys=keys, window=7),
    }[form]
    return Seen(*(None if one is None else one.to(device) for one in (made.mask, made.keys, made.places)), made.window)


def full(query: Tensor, key: Tensor, scaling: float, seen: Seen) -> tuple[Tensor, Tensor]:
    """Maps and log-sum-exp in fp64, the whole at a time. [B, H, Q, K], [B, H, Q]"""
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.repeat_interleave(group, 1).double().transpose(-1, -2) * scaling
    mask = seen.of(slice(None), key.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = (scores + mask).masked_fill(mask < -1e30, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1)


def tensors(dtype, width, n_query, n_key, device, batch=2, heads=2, kv_heads=1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as transformers gives them: transposed views."""
    generator = torch.Generator().manual_seed(width + n_query)

    def made(count: int, of: int) -> Tensor:
        return torch.randn(batch, count, of, width, generator=generator).to(device, dtype).transpose(1, 2)

    return made(n_query, heads), made(n_key, kv_heads), made(n_key, kv_heads)


def compare(dtype, width, n_query, n_key, form, device, n_classes=3, **shape) -> None:
    """All three kernels."""
    query, key, value = tensors(dtype, width, n_query, n_key, device, **shape)
    batch, heads = query.shape[:2]
    seen, scaling, close = views(form, batch, heads, n_query, n_key, device), 1.3 * width**-0.5, CLOSE[dtype]
    shown, lse = full(query, key, scaling, seen)
    values = value.repeat_interleave(heads // key.shape[1], 1).double()

    generator = torch.Generator().manual_seed(1)
    rows = (torch.rand(batch, n_query, generator=generator) > 0.4).to(device)
    for counted in (None, rows):
        sums, found = launch.column_sums(query, key, scaling, rows=counted, **seen.parts)
        expected = (shown if counted is None else shown * rows[:, None, :, None]).sum(2)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)

    out, found = launch.with_lse(query, key, value, scaling, **seen.parts)
    assert out.dtype == dtype and out.shape == query.shape
    torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), shown @ values, rtol=close, atol=close)

    kinds = torch.randint(0, n_classes + 1, (batch, heads, n_key), generator=generator).to(device)
    classes = torch.stack([kinds == c for c in range(n_classes)])
    scales = torch.linspace(-0.5, 2.5, n_classes, device=device)

    def factors(masses: Tensor) -> Tensor:
        return scales + masses.flip(-1) ** 2

    masses = torch.einsum("bhqk,cbhk->bhqc", shown, classes.double())
    wanted = torch.cat([factors(masses), torch.ones_like(masses[..., :1])], -1)
    weights = wanted.gather(-1, kinds[:, :, None].expand(-1, -1, n_query, -1))
    out = launch.redistribute(query, key, value, classes, factors, scaling, **seen.parts)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), (shown * weights) @ values, rtol=close, atol=2 * close)


FAST = (
    (torch.float32, 80, 17, 100, "padded"),
    (torch.bfloat16, 64, 100, 100, "window"),
    (torch.float16, 32, 1, 65, "causal"),  # the last key alone in its block
    (torch.float16, 80, 17, 100, "bool"),
    (torch.bfloat16, 128, 17, 100, "additive"),
    (torch.float32, 64, 1, 197, "none"),
)


@pytest.mark.parametrize("device", [INTERPRETED, ON_GPU])
@pytest.mark.parametrize("case", FAST, ids=str)
def test_a_few_of_the_grid(case, device):
    compare(*case, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_grid(form, width, device):
    """Every form with every width; lengths and types in turn."""
    turn = FORMS.index(form) + WIDTHS.index(width)
    for n in range(2):
        compare(TYPES[(turn + n) % 3], width, *LENGTHS[(turn + n) % 3], form, device)
    if form in ("none", "padded"):
        compare(TYPES[turn % 3], width, *LENGTHS[3], form, device, batch=1)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize(
    ("dtype", "form", "width"), list(itertools.product(TYPES, FORMS, (*WIDTHS, 72, 96, 256))), ids=str
)
def test_the_grid_on_a_gpu(dtype, form, width):
    for n_query, n_key in (*LENGTHS, (1, 4099), (333, 2500)):
        compare(dtype, width, n_query, n_key, form, "cuda", heads=6, kv_heads=2)
        compare(dtype, width, n_query, n_key, form, "cuda", n_classes=1, heads=3, kv_heads=3)


def test_sizes_as_a_gpu_has_them(monkeypatch, device):
    """Blocks of fp32, heads of 256, values narrower than keys, keys shared by pairs of heads, and by none."""
    monkeypatch.undo()
    compare(torch.float32, 48, 33, 33, "causal", device, batch=1, heads=4, kv_heads=2)
    compare(torch.bfloat16, 256, 5, 33, "padded", device, batch=1, heads=2, kv_heads=2)
    query, key, value = tensors(torch.float32, 20, 9, 18, device)
    shown, _ = full(query, key, 0.3, Seen())
    narrow = value[..., ::2]  # numbers of a line not side by side
    out, _ = launch.with_lse(query, key, narrow, 0.3)
    torch.testing.assert_close(out.double(), shown @ narrow.repeat_interleave(2, 1).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [pytest.param("bool", marks=pytest.mark.slow), "padded"])
def test_rows_cut_into_chunks(form, monkeypatch, device):
    """As for a token that is decoded over many keys; some chunks hold nothing that a row sees."""
    monkeypatch.setattr(launch, "chunks", lambda *_: 3)
    compare(torch.float32, 32, 1, 150, form, device)
    compare(torch.float16, 32, 3, 150, form, device, batch=1)


def test_how_many_chunks(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda _: 100)
    device = torch.device("cpu")
    assert launch.chunks(28, 1356, device) == 1, "short rows stay whole"
    assert launch.chunks(28, 32_768, device) == 7
    assert launch.chunks(28, 4096, device) == 4, "no chunk is short"
    assert launch.chunks(400, 32_768, device) == 1, "the device is busy"


def test_rows_that_see_nothing(device):
    query, key, value = tensors(torch.float32, 32, 5, 9, device)
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool, device=device)
    mask[1, :, 2:4] = False
    out, lse = launch.with_lse(query, key, value, 0.3, mask=mask)
    assert lse[1, :, 2:4].isneginf().all() and not out[1, :, 2:4].any()
    classes = torch.arange(9, device=device)[None, None, None] < 3
    out = launch.redistribute(query, key, value, classes, lambda masses: masses + 2, 0.3, mask=mask)
    assert not out[1, :, 2:4].any() and out.isfinite().all()
    sums, _ = launch.column_sums(query, key, 0.3, mask=mask)
    torch.testing.assert_close(sums.sum(-1), torch.tensor([[5.0, 5.0], [3.0, 3.0]], device=device))


def test_fp16_at_its_limits(device):
    """Rows as flat as 2,000 keys make them, factors far beyond fp16, and all mass but a hair taken away."""
    torch.manual_seed(0)
    query, key, value = tensors(torch.float16, 16, 2, 2000, device, batch=1, heads=1)
    member = torch.zeros(1, 1, 1, 2000, dtype=torch.bool, device=device)
    member[..., :100] = True
    shown, _ = full(query, key, 0.01, Seen())
    value = 1e-3 * value  # what comes out is no larger than fp16 can hold
    for factor in (1e9, -3.0, 0.0):
        weights = torch.where(member[0], factor, 1.0)
        out = launch.redistribute(query, key, value, member, lambda m, f=factor: torch.full_like(m, f), 0.01)
        expected = (shown * weights) @ value.double()
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-3, (factor, float(error))
    key[:, :, 0] = 40 * query[:, :, 0]
    shown, _ = full(query, key, 0.2, Seen())
    alone = torch.arange(2000, device=device)[None, None, None] == 0
    assert shown[0, 0, 0, 0] > 0.99
    out = launch.redistribute(query, key, value, alone, torch.zeros_like, 0.2)
    expected = shown.masked_fill(alone[0], 0.0) @ value.double()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=1e-4)


def test_nothing_to_do(device):
    for batch, n_query, n_key in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, key, value = tensors(torch.float32, 16, n_query, n_key, device, batch=batch)
        sums, lse = launch.column_sums(query, key, 1.0)
        assert sums.shape == (batch, 2, n_key) and not sums.any()
        assert lse.shape == (batch, 2, n_query) and lse.isneginf().all()
        out, _ = launch.with_lse(query, key, value, 1.0)
        assert out.shape == query.shape and not out.any()
        classes = torch.ones(1, 1, 1, n_key, dtype=torch.bool, device=device)
        assert not launch.redistribute(query, key, value, classes, torch.ones_like, 1.0).any()


def test_the_torch_path_of_column_sums(monkeypatch):
    monkeypatch.setattr(engine, "ENTRIES_CPU", 2 * 2 * 19 * 2)  # blocks of two rows
    for form in FORMS:
        query, key, _ = tensors(torch.float32, 16, 7, 19, "cpu")
        seen = views(form, 2, 2, 7, 19, "cpu")
        shown, lse = full(query, key, 0.4, seen)
        for rows in (None, torch.tensor([[True] * 7, [False, True] * 3 + [False]])):
            sums, found = engine.column_sums(query, key, 0.4, seen, rows)
            expected = shown if rows is None else shown * rows[:, None, :, None]
            torch.testing.assert_close(sums.double(), expected.sum(2), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-6)


# --- who uses them ---------------------------------------------------------------------------------------------


def test_where_kernels_run(monkeypatch):
    def given(**changed):
        like = {"is_cuda": True, "dtype": torch.float16, "shape": (1, 2, 3, 256), "requires_grad": False}
        return SimpleNamespace(**{**like, "device": torch.device("cuda", 0), **changed})

    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_supported", lambda _: True)
    assert kernels.usable(given(), given())
    assert not kernels.usable(torch.zeros(1, 1, 1, 8))
    assert not kernels.usable(given(shape=(1, 2, 3, 257)))
    assert not kernels.usable(given(dtype=torch.float64))
    assert not kernels.usable(given(), given(dtype=torch.bfloat16))
    assert not kernels.usable(given(), given(requires_grad=True))
    with torch.no_grad():
        assert kernels.usable(given(), given(requires_grad=True))
    monkeypatch.setattr(kernels, "_supported", lambda _: False)
    assert not kernels.usable(given())
    monkeypatch.setattr(kernels, "_supported", lambda _: True)
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert not kernels.usable(given())
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="VLMFAST_KERNELS=cuda: auto, or torch"):
        kernels.usable(torch.zeros(1, 1, 1, 8))


@pytest.mark.slow
def test_no_triton_no_kernels():
    """A process in which Triton cannot be imported runs on torch; one that can leaves the kernels alone."""
    code = """
import sys
import torch
from vlmfast import kernels
from vlmfast.edits import engine
query = torch.ones(1, 1, 2, 16)
engine.column_sums(query, query, 1.0)
assert "vlmfast.kernels.launch" not in sys.modules
sys.modules["triton"] = None
assert not kernels._supported(torch.device("cuda"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def through_kernels(monkeypatch):
    """Everything goes through the kernels; names of those that were called."""
    called = []

    def noted(name):
        function = getattr(launch, name)
        return lambda *args, **kwargs: called.append(name) or function(*args, **kwargs)

    made = SimpleNamespace(**{name: noted(name) for name in ("column_sums", "redistribute", "with_lse")})
    monkeypatch.setattr(kernels, "launcher", lambda: made)
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    return called


def test_the_engine_and_the_tower_use_them(through_kernels, monkeypatch, device):
    query, key, value = tensors(torch.float32, 16, 7, 19, device)
    seen = views("padded", 2, 2, 7, 19, device)
    kinds = torch.randint(0, 6, (19,), device=device)

    def all_of(causal: bool) -> list[Tensor]:
        few, many = ((torch.stack([kinds == c for c in range(n)])[:, None, None]) for n in (2, 5))
        return [
            *engine.column_sums(query, key, 0.3, seen),
            engine.redistribute(query, key, value, few, lambda m: 1 + m, 0.3, seen),
            engine.redistribute(query, key, value, many, lambda m: 1 + m, 0.3, seen),
            *engine.with_lse(query, key, value, 0.3, seen),
            column_mean(query, key, 0.3, None, causal),
            column_mean(query, key, 0.3, views("by head", 2, 2, 7, 19, device).mask[:, :, 2:3].repeat(1, 1, 7, 1)),
            column_mean(query, key, 0.3, softmax=False),
        ]

    ours = all_of(True)
    assert through_kernels == ["column_sums", "redistribute", "with_lse", "column_sums", "column_sums"]
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    plain = all_of(True)
    for ours_one, torch_one in zip(ours, plain):
        seen_rows = torch_one.isfinite()
        torch.testing.assert_close(ours_one[seen_rows], torch_one[seen_rows], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_the_bench_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    assert bench_kernels.main() == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_the_bench_sees_what_is_wrong(monkeypatch, through_kernels):
    """Its error is measured against the torch path, in both directions."""
    given = bench_kernels.Given.of(bench_kernels.SMALL[2], torch.float16, "cpu")
    monkeypatch.setattr(kernels, "usable", lambda *_: os.environ.get(kernels.VARIABLE) != "torch")
    for name in bench_kernels.KERNELS:
        assert bench_kernels.error(name, given) < bench_kernels.CLOSE[torch.float16]
    assert through_kernels == ["column_sums", "redistribute", "with_lse"]
    monkeypatch.setattr(launch.Job, "attend", lambda self, value: (1.01 * self.query, None))
    assert bench_kernels.error("with_lse", given) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["zerotuning:gamma=1.5", "zerotuning:gamma=0.0", "hiprune:keep=0.5"])
def test_whole_models(vlm, spec, through_kernels):
    """Left-padded prompts, decoding and several images give the same tokens through kernels."""
    import vlmfast

    inputs = vlm.prompts([[3, "a", 2], [2, "b", 1, "c", 6]])
    with vlmfast.patch(vlm.model, spec):
        ours = vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert through_kernels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "usable", lambda *_: False)
            assert torch.equal(ours, vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False))


COMPILE = """
import re, subprocess, sys, tempfile, warnings
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from vlmfast.kernels import launch

warnings.simplefilter("ignore")
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:  # a device that is not there
    get_current_device = lambda self: 0
    get_current_stream = lambda self, _: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)


def start(self, program, blocks, parts, *args, **flags):
    made = program.run(*args, grid=(1, 1, 1), warmup=True, **self.flags, **flags)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\\d+)", text).group(1))
    print(program.__name__, made.metadata.shared, stack, *self.query.shape, self.query.dtype)


driver.set_active(Absent())
launch.Job.start = start
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for width in (64, 80, 128, 256):
        for n_query in (1, 300) if dtype == torch.float16 else (300,):
            if dtype == torch.bfloat16 and width != 128:  # cut as fp16
                continue
            query = torch.empty(2, n_query, 8, width, dtype=dtype).transpose(1, 2)
            key = torch.empty(2, 300, 4, width, dtype=dtype).transpose(1, 2)
            keys, places = torch.ones(2, 300, dtype=torch.bool), torch.arange(n_query)
            classes = torch.ones(3, 2, 1, 300, dtype=torch.bool)
            everything = {"keys": keys, "places": places, "window": 64}
            masks = ({}, everything, {"mask": torch.ones(2, 1, n_query, 300, dtype=torch.bool)})
            for seen in masks if n_query > 1 else masks[1:2]:
                launch.column_sums(query, key, 0.1, rows=torch.ones(2, n_query, dtype=torch.bool), **seen)
                launch.with_lse(query, key, key, 0.1, **seen)
                launch.redistribute(query, key, key, classes, lambda masses: masses, 0.1, **seen)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(80, 99), (90, 227), (120, 99)])
def test_programs_compile_for_devices_that_are_not_here(capability, shared):
    """Down to machine code, with the shared memory (KiB) that such devices have, and next to no registers spilled.

    8.0 stands for its smaller relatives 8.6 and 8.9 too, which run the same code.
    """
    tools = pytest.importorskip("triton").__path__[0]
    if not (Path(tools) / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton has no CUDA tools")
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(capability)],
            env={**environment, "TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [re.match(r"(\w+) (\d+) (\d+) ", line) for line in done.stdout.splitlines()]
    assert {one.group(1) for one in found} == {"row_sums", "column_sums", "attend", "weigh"}
    for one in found:
        assert int(one.group(2)) <= shared * 1024 and int(one.group(3)) <= 128, one.string
