"""What all families share: inputs, verification and clocks.

A Problem is one thing to compute with inputs in several sets, and the candidates that compute it. A
candidate's call(i) works on set i and returns its result. Each is first held against a float64
computation; who is wrong is not timed. The right ones are timed in turns.

On a GPU the sets together are larger than the L2 and the calls are captured into a CUDA graph, so that
neither a warm cache nor the time of Python counts; what cannot be captured is timed between two events
on the stream, and says so. On the CPU each call has its two looks at the clock.

SPDX-License-Identifier: Apache-2.0
"""

import contextlib
import ctypes
import itertools
import math
import os
import statistics
import time

import torch

import qkv

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The largest difference from a float64 result x, as a share of |x| + the root mean square of all x.
TOLERANCE = {"f32": 5e-5, "f16": 3e-3, "bf16": 2e-2}
ROUNDS = 3  # turns that each candidate gets
MAX_SETS = 512
BLOCK = 1048583  # random values before they repeat; a prime, so that no page is like another
MAX_SKIP = 160  # characters of a reason


def last_level_cache():
    """Bytes of the CPU's largest cache, 32 MB where the system does not say."""
    path = "/sys/devices/system/cpu/cpu0/cache/index3/size"
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
        return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 32 << 20


def keep_freed_memory():
    """glibc gives large blocks back to the system, and torch, which makes its results anew at each call,
    would pay for their pages again and again; a GPU's allocator keeps them too."""
    mmap_max, trim_threshold, at_most = -4, -1, (1 << 31) - 1
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, at_most)


class Bench:
    """Where and how long: the device, its context, and the sizes that follow from them."""

    def __init__(self, device="cpu", threads=0, quick=False):
        self.device = torch.device(device)
        self.gpu = self.device.type == "cuda"
        if self.gpu:
            self.device = torch.device("cuda", self.device.index or 0)
        self.quick = quick
        self.threads = threads or len(os.sched_getaffinity(0))
        if self.gpu:
            torch.cuda.set_device(self.device)
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.rotate_bytes = 4 * cache
        else:
            torch.set_num_threads(self.threads)
            keep_freed_memory()
            self.rotate_bytes = (16 << 20) if quick else min(2 * last_level_cache(), 256 << 20)
        self.seconds = 0.02 if quick else 0.24
        self.ctx = qkv.Context(str(self.device), num_threads=0 if self.gpu else self.threads)
        # Of their own, so that inputs do not depend on how often a peer drew random numbers.
        self.random = torch.Generator(self.device).manual_seed(7)
        self.random_on_host = torch.Generator().manual_seed(7)

    def num_sets(self, set_bytes):
        """How many sets of inputs push each other out of the caches."""
        return max(1, min(MAX_SETS, math.ceil(self.rotate_bytes / set_bytes)))

    def filled(self, shape, dtype):
        """Normal random values; on the CPU the same BLOCK of them over and over."""
        if self.gpu:
            return torch.randn(shape, dtype=DTYPES[dtype], device=self.device, generator=self.random)
        block = torch.randn(min(BLOCK, math.prod(shape)), generator=self.random).to(DTYPES[dtype])
        out = torch.empty(shape, dtype=DTYPES[dtype])
        for part in out.view(-1).split(BLOCK):
            part.copy_(block[: part.numel()])
        return out

    def pages(self, count):
        """The numbers of so many pages in random order: i32 on the host."""
        return torch.randperm(count, dtype=torch.int32, generator=self.random_on_host)

    def empty(self, shape, dtype):
        return torch.empty(shape, dtype=DTYPES[dtype], device=self.device)

    def on_device(self, tensor):
        return tensor.to(self.device)


class Candidate:
    """One library's way to compute a problem.

    make() prepares and returns call(i); it may raise what the library raises. Of the forms of one
    library the fastest counts. within() is a context manager that the calls are made in.
    """

    def __init__(self, library, make, form="", within=contextlib.nullcontext):
        self.library, self.make, self.form, self.within = library, make, form, within


def flashinfer_candidate(bench, make, form=""):
    """A list with FlashInfer's way, which has none on a CPU."""
    return [Candidate("flashinfer", make, form)] if bench.gpu else []


class Problem:
    """params: what is written to the record, "dtype" among them. bytes, flops: of one call, 0 where they
    do not say anything. check(result): pairs (got, wanted) of tensors of set 0, wanted in float64; or
    a text that says what is wrong, or None. reset(): brings back set 0's inputs, for calls that write
    to them. clock: None = that of the device."""

    def __init__(self, family, label, params, num_sets, set_bytes, candidates, check, *, bytes=0,
                 flops=0, reset=lambda: None, clock=None):
        self.family, self.label, self.params = family, label, params
        self.num_sets, self.set_bytes = num_sets, set_bytes
        self.candidates, self.check, self.reset = candidates, check, reset
        self.bytes, self.flops, self.clock = bytes, flops, clock


# ---- verification --------------------------------------------------------------------------------


def difference(got, wanted):
    """The largest difference, as TOLERANCE counts it; infinite for another shape and for NaN."""
    if got.shape != wanted.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    scale = wanted.abs() + wanted.square().mean().sqrt().clamp_min(1e-30)
    worst = ((got.double() - wanted).abs() / scale).max().item()
    return math.inf if math.isnan(worst) else worst


def verdict(problem, result):
    """(error, what is wrong or None) of a candidate's result."""
    found = problem.check(result)
    if found is None or isinstance(found, str):
        return None, found
    error = max(difference(got, wanted) for got, wanted in found)
    limit = TOLERANCE[problem.params["dtype"]]
    return error, f"differs by {error:.3g}, {limit:g} allowed" if error > limit else None


# ---- clocks --------------------------------------------------------------------------------------


class CpuClock:
    """Seconds of single calls, the sets in turn."""

    how = "call"

    def __init__(self, call, num_sets):
        self.call, self.sets = call, itertools.cycle(range(num_sets))
        call(next(self.sets))

    def sample(self, seconds):
        took, end = [], time.perf_counter() + seconds
        while not took or time.perf_counter() < end:
            i = next(self.sets)
            start = time.perf_counter()
            self.call(i)
            took.append(time.perf_counter() - start)
        return took


class GpuClock:
    """Seconds of a call as the mean over calls that follow each other on the stream, the sets in turn:
    a graph of them that is replayed, or else the calls themselves."""

    def __init__(self, call, num_sets):
        self.calls = max(num_sets, 10)
        self.order = [i % num_sets for i in range(self.calls)]
        self.call, self.stream = call, torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for i in self.order[:3]:  # compiles and loads what is needed
                call(i)
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.how = "graph"
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.enqueue()
        except RuntimeError:  # something in the call waits for the GPU
            torch.cuda.synchronize()
            self.graph, self.how = None, "stream"

    def enqueue(self):
        for i in self.order:
            self.call(i)

    def sample(self, seconds):
        took, end = [], time.perf_counter() + seconds
        with torch.cuda.stream(self.stream):
            while len(took) < 5 or time.perf_counter() < end:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                if self.graph:
                    self.graph.replay()
                else:
                    self.enqueue()
                stop.record()
                stop.synchronize()
                took.append(start.elapsed_time(stop) * 1e-3 / self.calls)
        return took[1:]


# ---- a problem, from inputs to records -----------------------------------------------------------


def reason(error):
    """The first line of an exception, for the record."""
    if isinstance(error, ImportError):
        return "not installed"
    text = str(error).strip().split("\n", maxsplit=1)[0]
    return f"{type(error).__name__}: {text}"[:MAX_SKIP]


def measure(bench, problem):
    """The records of a problem, one a candidate: timed, wrong or skipped."""
    records, clocks = [], []
    clock_of = problem.clock or (GpuClock if bench.gpu else CpuClock)
    for candidate in problem.candidates:
        record = {"family": problem.family, "label": problem.label, **problem.params,
                  "library": candidate.library, "form": candidate.form, "sets": problem.num_sets,
                  "cold": problem.num_sets * problem.set_bytes >= bench.rotate_bytes}
        records.append(record)
        problem.reset()
        try:
            with candidate.within():
                call = candidate.make()
                result = call(0)
                error, wrong = verdict(problem, result)
                del result
                if error is not None:
                    record["error"] = error
                if wrong:
                    record["wrong"] = wrong
                    continue
                clock = clock_of(call, problem.num_sets)
        except Exception as error:  # a peer does not take this problem, for whatever reason
            record["wrong" if candidate.library == "qkv" else "skipped"] = reason(error)
            continue
        record["timed"] = clock.how
        clocks.append((record, candidate, clock, []))
    for _ in range(ROUNDS):
        for _, candidate, clock, took in clocks:
            with candidate.within():
                took += clock.sample(bench.seconds / ROUNDS)
    for record, _, _, took in clocks:
        add_times(record, took)
        if problem.bytes:
            record["gbps"] = problem.bytes / record["us"] * 1e-3
        if problem.flops:
            record["tflops"] = problem.flops / record["us"] * 1e-6
    return records


def add_times(record, seconds):
    """The median, and what a tenth of the samples lies below and above."""
    low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
    record.update(us=statistics.median(seconds) * 1e6, us_low=low * 1e6, us_high=high * 1e6,
                  samples=len(seconds))
