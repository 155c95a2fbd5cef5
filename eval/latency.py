"""Time and memory of one prompt: time to first token, prefill, decode, peak bytes.

How times are taken, so that two numbers of the same process may be compared:

* **Clock.** On a CPU with one thread: process time (`time.process_time`), which stands still while another program
  has the core; on a quiet machine it equals wall time. With more threads process time adds the threads up, and on an
  accelerator it does not see the device, so both take wall time (`time.perf_counter`). `Clock.name` says which.
* **Device.** An accelerator is synchronised before every reading.
* **Warm-up.** Every variant runs before the first reading (lazy initialisation, hooks that transformers installs on
  the first call, autotuning).
* **Drift.** What is compared runs in turns, A B B A A B ..., never first all A and then all B, so that a machine
  that slows down slows both; ratios are formed within a round and their median is reported with its quartiles.

Peak memory is on CUDA the allocator's high-water mark (`max_memory_allocated`), elsewhere an exact count of the bytes
of all live tensors made by torch operations (`LiveBytes`), not the resident set of the process, which keeps what was
freed and depends on the machine. The count misses scratch memory inside a kernel.
"""

import gc
import inspect
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria, StoppingCriteriaList

from vlmfast.patching import entrance

T = TypeVar("T")
MB = 1e6  # bytes in the megabyte of all reports (decimal)


@dataclass(frozen=True)
class Spread:
    """Median of repeated readings with the quartiles as `low` and `high`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise readings; one reading is its own median and quartiles; none raises ValueError."""
        if not values:
            raise ValueError("no readings to summarise: repeats must be at least 1")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Clock:
    """A clock that suits a device and a number of threads; readings in seconds."""

    name: str
    device: torch.device
    counter: Callable[[], float]

    @classmethod
    def of(cls, device: torch.device | str, threads: int = 1) -> "Clock":
        """Process time on a CPU with one thread, else wall time (see the module's docstring)."""
        device = torch.device(device)
        if device.type == "cpu" and threads == 1:
            return cls("process time", device, time.process_time)
        return cls("wall time", device, time.perf_counter)

    def read(self) -> float:
        """Wait for the device, then read."""
        synchronize(self.device)
        return self.counter()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Run `work` once, without gradients, and return its milliseconds."""
        with torch.no_grad():
            start = self.read()
            result = work()  # kept until the clock is read: freeing the result is not part of the work
            end = self.read()
        del result
        return 1000 * (end - start)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done everything asked of it; a CPU always has."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Let torch use this many CPU threads inside the block; the former number returns after it."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a positive integer, got {threads!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(variants: Mapping[str, Callable[[], T]], *, repeats: int = 10, warmup: int = 1) -> dict[str, list[T]]:
    """Call every variant `repeats` times in turns and collect what each returns; `warmup` rounds are thrown away.

    The order turns around every round (A B, B A, A B, ...): a steady drift of the machine cancels, and no variant
    always runs behind the same one. Entry i of every list comes from the same round, so entries i may be compared.
    Garbage is collected between rounds and never inside one: a full collection takes as long as a small prefill.
    """
    check_repeats(repeats, warmup)
    results: dict[str, list[T]] = {name: [] for name in variants}
    names = list(variants)
    collects = gc.isenabled()
    gc.disable()
    try:
        for i in range(-warmup, repeats):
            gc.collect()
            for name in names if i % 2 == 0 else reversed(names):
                result = variants[name]()
                if i >= 0:
                    results[name].append(result)
    finally:
        if collects:
            gc.enable()
    return results


def check_repeats(repeats: int, warmup: int) -> None:
    """Raise ValueError unless repeats >= 1 and warmup >= 0."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of above[i] / below[i]: readings of the same round are paired."""
    if len(above) != len(below):
        raise ValueError(f"paired readings must be equally many, got {len(above)} and {len(below)}")
    return Spread.of([a / b for a, b in zip(above, below)])


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors made inside the block and still alive; `peak` is the most there were at once.

    Exact for everything that torch operations return, on any device; storage that existed before the block does not
    count. A kernel's own scratch memory is invisible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage_key(leaf) not in self._known | before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(work: Callable[[], object], *devices: torch.device | str) -> int:
    """Most bytes that `work`, run once without gradients, held at a time above what was held before it.

    Of several devices: the sum of what each held at most.
    """
    cuda = [device for device in map(torch.device, devices) if device.type == "cuda"]
    with torch.no_grad():
        if cuda:
            for device in cuda:
                synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            before = sum(map(torch.cuda.memory_allocated, cuda))
            work()
            for device in cuda:
                synchronize(device)
            return sum(map(torch.cuda.max_memory_allocated, cuda)) - before
        with LiveBytes() as count:
            work()
        return count.peak


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


class Forwards:
    """Counts what runs through a model's decoder: `calls`, and `rows`, summed over them."""

    def __init__(self, model: nn.Module) -> None:
        self.first = _base(model).get_decoder().layers[0]
        self.calls = self.rows = 0

    def __enter__(self) -> "Forwards":
        self.hook = self.first.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.rows += len(args[0] if args else kwargs["hidden_states"])


class _Stamps(StoppingCriteria):
    """Notes the time after every generated token, what had been forwarded for the first, and never stops."""

    def __init__(self, clock: Clock, forwards: Forwards | None = None) -> None:
        self.clock = clock
        self.forwards = forwards
        self.times: list[float] = []
        self.begun = 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(self.clock.read())
        if len(self.times) == 1 and self.forwards is not None:
            self.begun = self.forwards.calls, self.forwards.rows
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Generation:
    """One timed `generate`: milliseconds to the first token and per later one of the whole batch.

    forwards_per_token: decoder calls for each later token; rows_per_token: their rows. What is per later token is None
    if only one token was generated.
    """

    ttft_ms: float
    decode_ms_per_token: float | None
    forwards_per_token: float | None = None  # None also where they were not counted
    rows_per_token: float | None = None


def generation(
    model: nn.Module, inputs: Mapping[str, Any], new_tokens: int, clock: Clock, *, beams: int = 1, count: bool = False
) -> Generation:
    """Time a `generate` of exactly `new_tokens` tokens as the user would call it, greedy or with `beams`.

    The first token's time contains everything: vision tower, selection, prefill, head; what a search goes back on
    counts for later tokens. `inputs`: as the processor gives them, on the model's device. count: forwards, too.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    forwards = Forwards(model) if count else None
    stamps = _Stamps(clock, forwards)
    with torch.no_grad(), forwards or nullcontext():
        start = clock.read()
        model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=beams,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
    ttft, later = 1000 * (stamps.times[0] - start), new_tokens - 1
    if not later:
        return Generation(ttft, None)
    decode = 1000 * (stamps.times[-1] - stamps.times[0]) / later
    if forwards is None:
        return Generation(ttft, decode)
    calls, rows = stamps.begun
    return Generation(ttft, decode, (forwards.calls - calls) / later, (forwards.rows - rows) / later)


def image_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a processor's output that the model's `get_image_features` takes; empty without an image."""
    if inputs.get("pixel_values") is None:
        return {}
    parameters = inspect.signature(_base(model).get_image_features).parameters
    named = {name: value for name, value in inputs.items() if name in parameters and value is not None}
    return {name: value for name, value in named.items() if name.startswith(("pixel_values", "image_"))}


def _base(model: nn.Module) -> Any:
    """The model below the head, also of a PEFT-wrapped model."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner.base_model


@dataclass(frozen=True)
class Latency:
    """Timings of one prompt batch on one model, patched or not. A part that does not occur is None.

    ttft_ms              `generate` until its first token: tower, projector, selection, prefill, head
    vision_ms            tower and projector alone (with the score statistics where a method takes them)
    prefill_ms           the rest of the first forward, from encoded images to the logits of the last position
    decode_ms_per_token  each further token of `generate`, whole batch
    forwards_per_token   decoder calls for each further token; rows_per_token: their rows
    peak_memory_mb       weights plus the most that one `generate` held (decimal MB; see `memory`)
    """

    ttft_ms: Spread
    vision_ms: Spread | None
    prefill_ms: Spread
    decode_ms_per_token: Spread | None
    forwards_per_token: float | None
    rows_per_token: float | None
    peak_memory_mb: float | None
    memory: str
    clock: str
    device: str
    threads: int
    repeats: int
    new_tokens: int
    beams: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts and numbers, for JSON."""
        return asdict(self)


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int = 8,
    repeats: int = 5,
    warmup: int = 1,
    threads: int = 1,
    memory: bool = True,
    beams: int = 1,
) -> Latency:
    """Time one prompt batch on the model as it stands (patched or not).

    `inputs`: as the processor gives them, on the model's device. With `pixel_values` the tower is part of the first
    token's time; with `mm_encoder_outputs` instead it is not, and `vision_ms` is None. `new_tokens`: tokens per
    timed `generate` (1: no decode time). `repeats`: readings of each part, taken in turns. `memory=False` leaves out
    the extra run that finds the peak. `beams`: `num_beams` of `generate`.
    """
    check_repeats(repeats, warmup)
    device = entrance(model)
    clock = Clock.of(device, threads)
    images = image_inputs(model, inputs)
    text = {name: value for name, value in inputs.items() if name not in images or name == "image_grid_thw"}

    def encode() -> Any:
        return _base(model).get_image_features(**images, return_dict=True)

    def prefill() -> float:
        encoded: dict[str, Any] = {}
        if images:
            with torch.no_grad():
                encoded = {"mm_encoder_outputs": {"image": encode()}}
        return clock.milliseconds(lambda: model(**text, **encoded, use_cache=True, logits_to_keep=1))

    variants: dict[str, Callable[[], Any]] = {
        "generate": lambda: generation(model, inputs, new_tokens, clock, beams=beams),
        "prefill": prefill,
    }
    if images:
        variants["vision"] = lambda: clock.milliseconds(encode)
    with use_threads(threads):
        readings = interleave(variants, repeats=repeats, warmup=warmup)
        peak = _peak_mb(model, inputs, new_tokens, clock, beams) if memory else None
        counted = generation(model, inputs, new_tokens, clock, beams=beams, count=True)
    decode = [g.decode_ms_per_token for g in readings["generate"] if g.decode_ms_per_token is not None]
    return Latency(
        ttft_ms=Spread.of([g.ttft_ms for g in readings["generate"]]),
        vision_ms=Spread.of(readings["vision"]) if images else None,
        prefill_ms=Spread.of(readings["prefill"]),
        decode_ms_per_token=Spread.of(decode) if decode else None,
        forwards_per_token=counted.forwards_per_token,
        rows_per_token=counted.rows_per_token,
        peak_memory_mb=peak,
        memory="CUDA allocator" if device.type == "cuda" else "live tensors",
        clock=clock.name,
        device=str(device),
        threads=threads,
        repeats=repeats,
        new_tokens=new_tokens,
        beams=beams,
    )


def _peak_mb(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int, clock: Clock, beams: int) -> float:
    """Weights plus the most bytes one `generate` held, in MB."""
    devices = {clock.device, *(parameter.device for parameter in model.parameters())}
    peak = peak_bytes(lambda: generation(model, inputs, new_tokens, clock, beams=beams), *devices)
    return (weight_bytes(model) + peak) / MB
