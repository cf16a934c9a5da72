"""The table, the JSON and the plots of records.

SPDX-License-Identifier: Apache-2.0
"""

import importlib.util
import json
import os
import platform
import re
import sys
import time
from importlib import metadata

import torch

import qkv

PACKAGES = ("numpy", "flashinfer-python", "triton")
COLORS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#b08ea2", "#6a4c93",
          "#c9a66b", "#444444")


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^(?:model name|Model)\s*: (.*)$", file.read(), re.M)
        return found.group(1) if found else platform.machine()
    except OSError:
        return platform.machine()


def machine(bench, arguments):
    """What a number needs beside it: the command, the machine, versions, date and load."""
    versions = {"qkv": ".".join(map(str, qkv.version())), "python": platform.python_version(),
                "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    if bench.gpu:
        versions["cuda"] = torch.version.cuda
    return {"command": " ".join(["python -m qkv.bench", *arguments]), "device": str(bench.device),
            "device_name": bench.ctx.device_name, "cpu": cpu_name(), "threads": bench.threads,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "load_before": os.getloadavg(),
            "versions": versions}


def where(about):
    """One line on the machine."""
    if about["device"] != "cpu":
        return about["device_name"]
    return f"{about['cpu']}, {about['device_name']}, {about['threads']} threads"


# ---- table ---------------------------------------------------------------------------------------


def number(value):
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def shown(records):
    """Of each library the fastest form, and what is wrong; of overheads every form."""
    best = {}
    for r in records:
        if "us" in r and r["family"] != "overhead":
            before = best.setdefault(r["library"], r)
            if r["us"] < before["us"]:
                best[r["library"]] = r
    return [r for r in records
            if "wrong" in r or "us" in r and (r["family"] == "overhead" or best[r["library"]] is r)]


def flops_unit(on_gpu):
    """The name of the unit, and how many there are in a TFLOP/s."""
    return ("TFLOP/s", 1) if on_gpu else ("GFLOP/s", 1000)


def rows(records, flops_scale):
    """Text columns of a problem's records."""
    ours = min((r["us"] for r in records if r["library"] == "qkv" and "us" in r), default=None)
    for r in shown(records):
        name = r["library"] + (f" ({r['form']})" if r["form"] else "")
        if "wrong" in r:
            yield [r["label"], r["dtype"], name, "wrong: " + r["wrong"]]
            continue
        notes = []
        if ours and r["library"] != "qkv":
            notes.append(f"{number(r['us'] / ours)}x")
        if "aim_us" in r and r["library"] == "qkv":
            notes.append(f"aim {number(r['aim_us'])}")
        tflops = r.get("tflops")
        yield [r["label"], r["dtype"], name, number(r["us"]), number(r.get("gbps")),
               number(tflops and tflops * flops_scale), ", ".join(notes)]


class Table:
    """Prints problems as they come, a head for each family."""

    def __init__(self, on_gpu, file=None):
        self.file, self.family = file or sys.stdout, None
        self.unit, self.scale = flops_unit(on_gpu)

    def line(self, cells):
        widths = (30, 6, 38, 9, 8, 9)
        out = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        print(" ".join(out + [" " + c for c in cells[6:]]).rstrip(), file=self.file, flush=True)

    def add(self, records):
        if self.family != records[0]["family"]:
            self.family = records[0]["family"]
            print(f"\n{self.family}", file=self.file)
            self.line(["problem", "dtype", "library", "us", "GB/s", self.unit, "of qkv's time"])
        for cells in rows(records, self.scale):
            if len(cells) == 4:
                self.line(cells[:3] + [""])
                print("    " + cells[3], file=self.file)
            else:
                self.line(cells)

    def skipped(self, records):
        """Who took no form of a problem, each reason once."""
        took = {(r["family"], r["label"], r["dtype"], r["library"]) for r in records
                if "skipped" not in r}
        reasons = {}
        for r in records:
            if "skipped" in r and (r["family"], r["label"], r["dtype"], r["library"]) not in took:
                where = reasons.setdefault((r["library"], r["skipped"]), [])
                where += [r["family"]] if r["family"] not in where else []
        if reasons:
            print("\nnot run", file=self.file)
        for (library, why), families in reasons.items():
            print(f"  {library}, {', '.join(families)}: {why}", file=self.file)


# ---- files ---------------------------------------------------------------------------------------


def write_json(path, about, records):
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": about, "records": records}, file, indent=1)
        file.write("\n")


def draw(folder, about, records):
    """A PNG a family; returns the paths, or None if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for family in dict.fromkeys(r["family"] for r in records):
        path = os.path.join(folder, f"{family}.png")
        if draw_family(path, family, about, [r for r in records if r["family"] == family]):
            paths.append(path)
    return paths


def draw_family(path, family, about, records):
    """Bars in groups, one a problem; each library has its colour. False if there is nothing to draw."""
    from matplotlib import pyplot

    groups = {}
    for r in records:
        groups.setdefault((r["label"], r["dtype"]), []).append(r)
    flops, scale = flops_unit(about["device"] != "cpu")
    units = {"gbps": "GB/s", "tflops": flops, "us": "us"}
    panels = {}  # {field: [(label, [records])]}; a call's time is what counts for overheads
    for (label, dtype), found in groups.items():
        timed = [r for r in shown(found) if "us" in r]
        if timed:
            field = next((f for f in units if f in timed[0]), "us")
            panels.setdefault(field, []).append((f"{label}\n{dtype}".strip(), timed))
    if not panels:
        return False
    names = list(dict.fromkeys(name_in_plot(r) for p in panels.values() for _, t in p for r in t))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    widths = [sum(len(t) + 1 for _, t in p) for p in panels.values()]
    figure, axes = pyplot.subplots(1, len(panels), squeeze=False, layout="constrained",
                                   width_ratios=widths,
                                   figsize=(min(20, max(7, 0.42 * sum(widths))), 4.4))
    for ax, (field, problems) in zip(axes[0], panels.items()):
        for at, (_, timed) in enumerate(problems):
            width = 0.84 / len(timed)
            for i, r in enumerate(timed):
                x = at + (i - (len(timed) - 1) / 2) * width
                height = r[field] * (scale if field == "tflops" else 1)
                ax.bar(x, height, width * 0.92, color=colors[name_in_plot(r)])
                ax.annotate(number(height), (x, height), ha="center", va="bottom", fontsize=6)
        ax.set_xticks(range(len(problems)), [label for label, _ in problems], fontsize=7)
        ax.set_ylabel(units[field])
        ax.spines[["top", "right"]].set_visible(False)
        if family == "overhead":
            ax.set_yscale("log")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False,
                  fontsize=8)
    better = "less is better" if list(panels) == ["us"] else "more is better"
    figure.suptitle(f"{family}, {better}\n{where(about)}, {about['date'][:10]}, "
                    f"load {about['load_before'][0]:.1f}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def name_in_plot(record):
    """Forms of one library share a colour, except where each of them is a subject of its own."""
    named = record["family"] == "overhead" and record["form"]
    return f"{record['library']} ({record['form']})" if named else record["library"]
