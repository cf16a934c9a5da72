"""Draws what compare.py measured: one PNG a subject, one colour a library, the ceiling as a line.

SPDX-License-Identifier: Apache-2.0
"""
import os

COLORS = {"qkv": "#d1495b", "qkv, flat": "#edae49", "torch": "#00798c", "vLLM": "#66a182",
          "ONNX Runtime": "#8d96a3", "OpenBLAS": "#b08ea2", "llama.cpp": "#2e4057",
          "Transformers": "#00798c"}
DTYPES = ("bf16", "f16", "f32")


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def panel(axes, groups, unit, title):
    """groups: [(label, {library: value}, ceiling or None)]; a bar a library in each."""
    libraries = [name for name in COLORS if any(name in bars for _, bars, _ in groups)]
    for at, (_, bars, ceiling) in enumerate(groups):
        there = [name for name in libraries if name in bars]
        width = 0.8 / len(there)
        for i, name in enumerate(there):
            x = at + (i - (len(there) - 1) / 2) * width
            axes.bar(x, bars[name], width * 0.92, color=COLORS[name])
            axes.annotate(number(bars[name]), (x, bars[name]), ha="center", va="bottom",
                          fontsize=7, xytext=(0, 1), textcoords="offset points")
        if ceiling:
            axes.plot([at - 0.45, at + 0.45], [ceiling, ceiling], color="black", linewidth=1.2)
    axes.set_xticks(range(len(groups)), [label for label, _, _ in groups])
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, axes.dataLim.y1 * 1.12)
    return libraries


def figure(path, title, panels):
    """panels: [(groups, unit, title)], one row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, patches, pyplot

    widths = [1 + len(groups) * max(len(bars) for _, bars, _ in groups) for groups, _, _ in panels]
    size = (min(18, max(8, 0.42 * sum(widths) + 1.2 * len(panels))), 4.4)
    fig, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained",
                                width_ratios=widths)
    shown = [panel(a, *p) for a, p in zip(axes[0], panels)]
    marks = [patches.Patch(color=COLORS[name], label=name)
             for name in COLORS if any(name in names for names in shown)]
    if any(ceiling for groups, _, _ in panels for _, _, ceiling in groups):
        marks.append(lines.Line2D([], [], color="black", label="ceiling, measured in this run"))
    fig.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=110)
    pyplot.close(fig)


def grouped(records, field, ceiling_unit):
    """[(label, bars, ceiling)] of records, in their order."""
    groups = {}
    for r in records:
        bars, ceilings = groups.setdefault(r["label"], ({}, []))
        bars[r["library"]] = r[field]
        if ceiling_unit and r.get("ceiling_unit") == ceiling_unit:
            ceilings.append(r["ceiling"])
    return [(label, bars, max(ceilings, default=None))
            for label, (bars, ceilings) in groups.items()]


def by_dtype(records, field, unit, title):
    """A panel a dtype that has records."""
    parts = [(d, [r for r in records if r["dtype"] == d]) for d in DTYPES]
    return [(grouped(part, field, unit), unit, f"{title}, {d}") for d, part in parts if part]


def draw(records, machine, folder):
    """The plots of those subjects that records have; returns their paths."""
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    of = {s: [r for r in records if r["section"] == s]
          for s in ("decode", "shared", "prefill", "gemm", "model")}
    small = [r for r in of["gemm"] if r["ceiling_unit"] == "GB/s"]
    large = [r for r in of["gemm"] if r["ceiling_unit"] != "GB/s"]
    shared = [(grouped(of["shared"], "ms", None), "ms, less is better", "shared prefix, bf16")]
    model = [(grouped([r for r in of["model"] if r["label"] == label], "tokens_per_s", "tokens/s"),
              "tokens/s", "") for label in dict.fromkeys(r["label"] for r in of["model"])]
    subjects = {
        "decode": ("Decode attention, 32/8 heads of 128, requests x keys",
                   by_dtype(of["decode"], "gbps", "GB/s", "keys and values read")
                   + (shared if of["shared"] else [])),
        "prefill": ("Causal prefill, 32/8 heads of 128, tokens",
                    by_dtype(of["prefill"], "gflops", "GFLOP/s", "attention")),
        "gemm": ("GEMM with weights 4096 x 4096, rows",
                 by_dtype(small, "gbps", "GB/s", "weights read")
                 + by_dtype(large, "gflops", "GFLOP/s", "products")),
        "end_to_end": ("A Llama of 254M parameters in bf16", model),
    }
    paths = []
    for name, (title, panels) in subjects.items():
        if panels:
            paths.append(os.path.join(folder, f"compare_{name}.png"))
            figure(paths[-1], f"{title}\n{where}", panels)
    return paths
