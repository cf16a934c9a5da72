"""python -m qkv.bench: see the package's docstring, and --help.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import importlib
import importlib.util
import os
import sys


FAMILIES = {"decode": "attention", "prefill": "attention", "append": "pointwise",
            "rmsnorm": "pointwise", "add_rmsnorm": "pointwise", "rope": "pointwise",
            "activation": "pointwise", "sampling": "logits", "gemm": "logits",
            "overhead": "overhead"}  # and the file with the function of that name


def parser():
    p = argparse.ArgumentParser(
        prog="python -m qkv.bench",
        description="Verifies qkv and the other libraries that are installed against float64 on the "
                    "same inputs, times them in turns, and writes a table, bench.json and plots. "
                    "The exit status is 1 if a result of qkv was wrong.")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    p.add_argument("--family", action="append", metavar="NAME", choices=FAMILIES,
                   help=f"only this one; may be given several times. One of: {', '.join(FAMILIES)}")
    p.add_argument("--library", action="append", metavar="NAME",
                   help="beside qkv only those whose library and form begin so, as with torch, "
                        "'torch cudnn' or 'flashinfer xqa'; may be given several times")
    p.add_argument("--quick", action="store_true", help="small problems and short timings")
    p.add_argument("--out", default="qkv-bench", metavar="DIR",
                   help="folder for bench.json and PNG files (default: qkv-bench)")
    p.add_argument("--threads", type=int, default=0, help="of the CPU (default: all that may be used)")
    return p


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print("qkv.bench needs torch: it makes the inputs and the float64 results", file=sys.stderr)
        return 2
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"--device {options.device}: torch finds no GPU", file=sys.stderr)
        return 2
    from . import measure, report

    bench = measure.Bench(options.device, options.threads, options.quick)
    about = report.machine(bench, arguments)
    print(f"{report.where(about)}, load {about['load_before'][0]:.2f}; "
          + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    if about["load_before"][0] > 0.5 * os.cpu_count():
        print("other programs are running: times are worth little, those of several threads least")
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "bench.json")
    table, records = report.Table(bench.gpu), []
    for family in options.family or FAMILIES:
        problems = getattr(importlib.import_module(f".{FAMILIES[family]}", __package__), family)
        with torch.inference_mode():
            for problem in problems(bench):
                if options.library:
                    wanted = ("qkv", *options.library)
                    problem.candidates = [c for c in problem.candidates
                                          if f"{c.library} {c.form}".startswith(wanted)]
                found = measure.measure(bench, problem)
                table.add(found)
                records += found
        about["load_after"] = os.getloadavg()
        report.write_json(path, about, records)  # what is there stays, whatever comes
    table.skipped(records)
    written = [path]
    drawn = report.draw(options.out, about, records)
    if drawn is None:
        print("\nno plots: matplotlib is not installed")
    print("\nwritten: " + ", ".join(written + (drawn or [])))
    wrong = [r for r in records if "wrong" in r]
    for r in wrong:
        print(f"wrong: {r['family']} {r['label']} {r['dtype']}, {r['library']}: {r['wrong']}",
              file=sys.stderr)
    return 1 if any(r["library"] == "qkv" for r in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
