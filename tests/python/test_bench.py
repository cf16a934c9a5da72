"""python -m qkv.bench: what it writes, and that a wrong result does not pass.

SPDX-License-Identifier: Apache-2.0
"""

import importlib.util
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import qkv  # noqa: E402
from qkv.bench import measure, report  # noqa: E402
from qkv.bench.__main__ import FAMILIES, main  # noqa: E402
from qkv.bench.logits import FILTERS, top_k_problem  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(what it printed, folder, content of bench.json) of a quick run of everything."""
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run([sys.executable, "-m", "qkv.bench", "--quick", "--threads", "2", "--out",
                           str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder, json.loads((folder / "bench.json").read_text())


def test_quick_run_times_qkv_and_torch_in_every_family(quick):
    _, _, content = quick
    libraries = {}
    for r in content["records"]:
        assert "wrong" not in r, r
        if "us" in r:
            libraries.setdefault(r["family"], set()).add(r["library"].split()[0])
    assert libraries.keys() == FAMILIES.keys()
    for family, names in libraries.items():
        assert {"qkv", "torch"} <= names, family


def test_json_says_where_and_with_what(quick):
    _, _, content = quick
    machine = content["machine"]
    assert machine["command"].startswith("python -m qkv.bench --quick")
    assert machine["device"] == "cpu" and machine["device_name"] and machine["cpu"]
    assert machine["threads"] == 2 and len(machine["load_before"]) == len(machine["load_after"]) == 3
    assert machine["versions"]["qkv"] == ".".join(map(str, qkv.version()))
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["date"][:2] == "20" and "T" in machine["date"]


def test_json_records_are_complete(quick):
    _, _, content = quick
    for r in content["records"]:
        assert r.keys() >= {"family", "label", "dtype", "library", "form", "sets", "cold"}
        if "skipped" not in r:
            assert 0 < r["us_low"] <= r["us"] <= r["us_high"] and r["samples"] >= 2
        if r["family"] in ("decode", "rmsnorm") and "us" in r:
            assert r["gbps"] > 0 and r["error"] < measure.TOLERANCE[r["dtype"]]
    aims = {r["label"]: r["aim_us"] for r in content["records"] if r["family"] == "overhead"}
    assert aims == {"rmsnorm 1 x 64": 5, "attention 1 x 1": 5, "import": 100e3}


def test_table_has_a_head_and_a_line_for_each_library(quick):
    printed, _, content = quick
    lines = printed.splitlines()
    for family in FAMILIES:
        at = lines.index(family)
        assert lines[at + 1].split()[:3] == ["problem", "dtype", "library"]
        section = lines[at + 2 : lines.index("", at)]
        for library in {r["library"] for r in content["records"] if r["family"] == family and "us" in r}:
            assert any(f" {library} " in line for line in section), (family, library)
    sdpa = [line for line in lines if "torch flash" in line]
    assert sdpa and all(line.endswith("x") for line in sdpa), "how much of qkv's time"


def test_plots_are_drawn_or_missed_aloud(quick):
    printed, folder, _ = quick
    drawn = {path.stem for path in folder.glob("*.png")}
    if importlib.util.find_spec("matplotlib"):
        assert drawn == FAMILIES.keys()
        assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert not drawn and "matplotlib is not installed" in printed


def records_of(folder):
    return json.loads((folder / "bench.json").read_text())["records"]


def run(folder, family, *options):
    return main(["--quick", "--threads", "2", "--out", str(folder), "--family", family, *options])


def test_wrong_values_are_caught_and_not_timed(tmp_path, monkeypatch, capsys):
    right = qkv.rmsnorm

    def off_in_one_element(x, *args, **options):
        out = right(x, *args, **options)
        out[-1, -1] += 0.2
        return out

    monkeypatch.setattr(qkv, "rmsnorm", off_in_one_element)
    assert run(tmp_path, "rmsnorm") == 1
    ours = [r for r in records_of(tmp_path) if r["library"] == "qkv"]
    assert ours and all("differs by" in r["wrong"] and "us" not in r for r in ours)
    peers = [r for r in records_of(tmp_path) if r["library"] == "torch"]
    assert peers and all("us" in r for r in peers)
    said = capsys.readouterr()
    assert "wrong: differs by" in said.out and "wrong: rmsnorm 1 x 64 f32, qkv" in said.err


def test_a_forgotten_residual_is_caught(tmp_path, monkeypatch):
    def without_the_sum(x, residual, weight, eps, *, out, ctx):
        return qkv.rmsnorm(residual, weight, eps, out=out, ctx=ctx)

    monkeypatch.setattr(qkv, "add_rmsnorm", without_the_sum)
    assert run(tmp_path, "add_rmsnorm") == 1


def test_draws_of_another_distribution_are_caught(tmp_path, monkeypatch):
    def the_largest(logits, *, out, ctx, **_options):
        return qkv.argmax(logits, out=out, ctx=ctx)

    monkeypatch.setattr(qkv, "sample", the_largest)
    assert run(tmp_path, "sampling") == 1
    found = [r["wrong"] for r in records_of(tmp_path) if "wrong" in r]
    assert len(found) == len(FILTERS) and all(text.startswith("shares of tokens") for text in found)


def test_tokens_that_a_filter_drops_are_caught(tmp_path, monkeypatch):
    right = qkv.sample

    def unfiltered(logits, *, top_k=None, top_p=None, min_p=None, **options):
        return right(logits, **options)

    monkeypatch.setattr(qkv, "sample", unfiltered)
    assert run(tmp_path, "sampling") == 1
    found = {r["label"]: r["wrong"] for r in records_of(tmp_path) if "wrong" in r}
    for label in FILTERS.keys() - {"sample"}:
        assert "not among those that are kept" in found[f"{label}, 8192 x 64"]


def test_other_libraries_are_left_out(tmp_path):
    assert run(tmp_path, "decode", "--library", "torch flash g", "--library", "torch math") == 0
    kept = {(r["library"], r["form"]) for r in records_of(tmp_path)}
    assert kept == {("qkv", ""), ("torch flash", "gqa"), ("torch math", "gqa"), ("torch math", "folded")}


def test_an_error_of_qkv_is_a_wrong_result(tmp_path, monkeypatch):
    def broken(*_args, **_options):
        raise qkv.Error("nothing works")

    monkeypatch.setattr(qkv, "gemm", broken)
    assert run(tmp_path, "gemm") == 1
    assert "nothing works" in records_of(tmp_path)[0]["wrong"]


def problem(*candidates, wanted=1.0):
    x = torch.full((4,), wanted, dtype=torch.float64)
    return measure.Problem("family", "label", {"dtype": "f32"}, 3, 16, candidates,
                           lambda got: [(got, x)])


@pytest.fixture(scope="module")
def bench():
    return measure.Bench("cpu", 1, quick=True)


def test_one_of_the_largest_that_is_missed_is_caught(bench, monkeypatch):
    right = qkv.top_k

    def with_the_second_twice(x, k, *, values, indices, **options):
        right(x, k, values=values, indices=indices, **options)
        values[:, 0], indices[:, 0] = values[:, 1], indices[:, 1]
        return values, indices

    monkeypatch.setattr(qkv, "top_k", with_the_second_twice)
    ours, torchs = measure.measure(bench, top_k_problem(bench, 2, 1000))
    assert ours["wrong"] == "not the 50 largest" and "us" in torchs


def test_a_peer_that_refuses_is_skipped_with_its_reason(bench):
    def missing():
        raise ImportError("no such module")

    def refusing():
        raise RuntimeError("not for this head_dim\nand more")

    ones = torch.ones(4)
    records = measure.measure(bench, problem(
        measure.Candidate("qkv", lambda: lambda i: ones), measure.Candidate("a", missing),
        measure.Candidate("b", refusing)))
    assert "us" in records[0]
    assert records[1]["skipped"] == "not installed"
    assert records[2]["skipped"] == "RuntimeError: not for this head_dim"


def test_sets_take_turns(bench):
    seen = []

    def call(i):
        seen.append(i)
        return torch.ones(4)

    measure.measure(bench, problem(measure.Candidate("qkv", lambda: call)))
    after_verification = seen[1:]
    assert after_verification[:6] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("got", [torch.ones(3), torch.tensor([1, 1, 1, float("nan")]),
                                 torch.tensor([1, 1, 1, 1.001])])
def test_shapes_nan_and_small_differences_count(bench, got):
    records = measure.measure(bench, problem(measure.Candidate("qkv", lambda: lambda i: got)))
    assert "wrong" in records[0]


def test_the_fastest_form_of_a_library_is_shown():
    base = {"family": "decode", "label": "l", "dtype": "f32", "library": "torch"}
    slow, fast = {**base, "form": "a", "us": 2.0}, {**base, "form": "b", "us": 1.0}
    wrong = {**base, "form": "c", "wrong": "differs"}
    assert report.shown([slow, fast, wrong]) == [fast, wrong]
    assert report.shown([{**slow, "family": "overhead"}, {**fast, "family": "overhead"}]) == [
        {**slow, "family": "overhead"}, {**fast, "family": "overhead"}]


def test_without_torch_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["--quick"]) == 2
    assert "needs torch" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["--quick", "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path):
    assert main(["--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    timed = [r for r in records_of(tmp_path) if r["library"] == "qkv" and r["family"] != "overhead"]
    assert timed and all(r["timed"] == "graph" for r in timed)
