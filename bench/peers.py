"""Kernels of other libraries on CPUs, as compare.py times them.

A peer is a function (problem, threads) -> {form: run}, run(i) being one call on the i-th set of
inputs, i from 0 on; forms are the reasonable ways to ask the library for this result, of which the
fastest counts. None: the library has no such operator. A missing package raises ImportError.

SPDX-License-Identifier: Apache-2.0
"""
import ctypes
import importlib.util
import math
import os

ROTATE_BYTES = 640e6  # inputs of a call and of those after it, before the first set comes again


def num_sets(set_bytes):
    return max(1, math.ceil(ROTATE_BYTES / set_bytes))


def torch_filled(shape, dtype):
    """Random values; the same few MB over and over, which no cache can know."""
    import torch

    block = torch.rand(1 << 20, dtype=torch.float32).to(dtype)
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    for at in range(0, flat.numel(), block.numel()):
        part = flat[at : at + block.numel()]
        part.copy_(block[: part.numel()])
    return out


def torch_dtype(p):
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[p["dtype"]]


def attention_shapes(p):
    return p["batch"], p["qo_len"], p["kv_len"], p["qo_heads"], p["kv_heads"], p["head_dim"]


# ---- torch ------------------------------------------------------------------------------------


def torch_kernels(p, threads):
    import torch

    torch.set_num_threads(threads)
    return torch_gemm(p) if p["op"] == "gemm" else torch_attention(p)


def torch_attention(p):
    import torch.nn.functional as F

    dtype = torch_dtype(p)
    batch, qo_len, kv_len, heads, kv_heads, dim = attention_shapes(p)
    sets = num_sets(2 * batch * kv_len * kv_heads * dim * dtype.itemsize)
    k = torch_filled((sets, batch, kv_heads, kv_len, dim), dtype)
    v = torch_filled((sets, batch, kv_heads, kv_len, dim), dtype)
    q = torch_filled((batch, heads, qo_len, dim), dtype)
    attend = F.scaled_dot_product_attention
    if p["op"] == "prefill":
        return {"sdpa": lambda i: attend(q, k[i % sets], v[i % sets], is_causal=True,
                                         enable_gqa=True)}
    folded = q.view(batch, kv_heads, heads // kv_heads, dim)

    def by_products(i):
        scores = folded @ k[i % sets].transpose(-1, -2) * dim**-0.5
        return scores.softmax(-1) @ v[i % sets]

    return {"sdpa, group folded": lambda i: attend(folded, k[i % sets], v[i % sets]),
            "matmul, group folded": by_products}


def torch_gemm(p):
    import torch.nn.functional as F

    dtype = torch_dtype(p)
    sets = num_sets(p["n"] * p["k"] * dtype.itemsize)
    w = torch_filled((sets, p["n"], p["k"]), dtype)
    x = torch_filled((p["m"], p["k"]), dtype)
    return {"linear": lambda i: F.linear(x, w[i % sets])}


# ---- vLLM: its paged attention ----------------------------------------------------------------

VLLM_PAGE = 32  # the smallest that its faster kernels take


def load_vllm():
    """The operators alone: the package's Python part wants its own torch."""
    import torch

    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ImportError("vllm")
    folder = spec.submodule_search_locations[0]
    torch.ops.load_library(os.path.join(folder, "_C.abi3.so"))
    return torch.ops._C


def vllm_kernels(p, threads):
    import torch

    if p["op"] == "gemm":
        return None
    ops = load_vllm()
    torch.set_num_threads(threads)
    dtype = torch_dtype(p)
    batch, qo_len, kv_len, heads, kv_heads, dim = attention_shapes(p)
    shared = p["shared"] // VLLM_PAGE
    pages = -(-kv_len // VLLM_PAGE)
    in_set = shared + batch * (pages - shared)
    sets = num_sets(2 * in_set * VLLM_PAGE * kv_heads * dim * dtype.itemsize)
    pool = torch_filled((sets * in_set, kv_heads, 2 * VLLM_PAGE, dim), dtype)
    k, v = pool.chunk(2, dim=2)
    tables = []
    for order in torch.randperm(sets * in_set, dtype=torch.int32).view(sets, in_set):
        own = order[shared:].view(batch, pages - shared)
        tables.append(torch.cat([order[:shared].expand(batch, shared), own], 1).contiguous())
    q = torch_filled((batch * qo_len, heads, dim), dtype)
    out = torch.empty_like(q)
    lens = torch.full((batch,), kv_len, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32) * qo_len
    isa = "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    plan = ops.get_scheduler_metadata(batch, heads, kv_heads, dim, lens, dtype, starts, True, -1,
                                      isa, True, None)

    def run(i):
        ops.cpu_attention_with_kv_cache(q, k, v, out, starts, lens, dim**-0.5, True, None, -1,
                                        tables[i % sets], 0.0, plan, None, None)

    return {f"paged, {isa}": run}


# ---- ONNX Runtime: grouped-query attention in f32 ---------------------------------------------


def onnxruntime_kernels(p, threads):
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    if p["op"] == "gemm" or p["dtype"] != "f32" or p["shared"]:
        return None
    batch, qo_len, kv_len, heads, kv_heads, dim = attention_shapes(p)
    shapes = {"q": (batch, qo_len, heads * dim), "k": (batch, qo_len, kv_heads * dim),
              "v": (batch, qo_len, kv_heads * dim), "past_k": (batch, kv_heads, kv_len, dim),
              "past_v": (batch, kv_heads, kv_len, dim)}
    outs = {"o": shapes["q"], "new_k": shapes["past_k"], "new_v": shapes["past_v"]}
    integers = {"lens": (batch,), "total": ()}
    node = helper.make_node("GroupQueryAttention", [*shapes, *integers], list(outs),
                            domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads)

    def info(names, kind):
        return [helper.make_tensor_value_info(n, kind, s) for n, s in names.items()]

    inputs = info(shapes, TensorProto.FLOAT) + info(integers, TensorProto.INT32)
    graph = helper.make_graph([node], "attention", inputs, info(outs, TensorProto.FLOAT))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    sets = num_sets(2 * batch * kv_len * kv_heads * dim * 4)
    fixed = {n: np.random.rand(*shapes[n]).astype(np.float32) for n in ("q", "k", "v")}
    fixed["o"] = np.empty_like(fixed["q"])
    fixed["lens"] = np.full((batch,), kv_len - 1, np.int32)
    fixed["total"] = np.array(kv_len, np.int32)
    cache = torch_filled((sets, 2, *shapes["past_k"]), torch_dtype(p)).numpy()

    def binding(of_set):
        """The new keys go to the cache in place: its last positions, or all of it."""
        bound = session.io_binding()
        where = dict(fixed, past_k=of_set[0], past_v=of_set[1], new_k=of_set[0], new_v=of_set[1])
        for name, at in where.items():
            bind = bound.bind_output if name in outs else bound.bind_input
            bind(name, "cpu", 0, at.dtype, at.shape, at.ctypes.data)
        return bound

    bindings = [binding(of_set) for of_set in cache]
    held = (fixed, cache)  # the bindings have bare pointers
    return {"gqa": lambda i: session.run_with_iobinding(bindings[i % sets]) or held}


# ---- GEMM alone: OpenBLAS by NumPy, and ggml --------------------------------------------------


def openblas_kernels(p, _threads):  # OPENBLAS_NUM_THREADS says it
    import numpy as np

    if p["op"] != "gemm" or p["dtype"] != "f32":
        return None
    sets = num_sets(p["n"] * p["k"] * 4)
    w = torch_filled((sets, p["n"], p["k"]), torch_dtype(p)).numpy()
    x = np.random.rand(p["m"], p["k"]).astype(np.float32)
    return {"matmul": lambda i: x @ w[i % sets].T}


class GgmlInit(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p),
                ("no_alloc", ctypes.c_bool)]


def load_ggml():
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ImportError("llama_cpp")
    folder = os.path.join(spec.submodule_search_locations[0], "lib")
    base = ctypes.CDLL(os.path.join(folder, "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(os.path.join(folder, "libggml-cpu.so"))
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph",
                 "ggml_get_data"):
        getattr(base, name).restype = ctypes.c_void_p
    return base, cpu


def ggml_kernels(p, threads):
    if p["op"] != "gemm":
        return None
    base, cpu = load_ggml()
    dtype = torch_dtype(p)
    size = p["n"] * p["k"] * dtype.itemsize
    sets = num_sets(size)
    room = sets * (size + 2 * p["m"] * p["n"] * 4) + p["m"] * p["k"] * 4 + (64 << 20)
    base.ggml_init.argtypes = [GgmlInit]
    ctx = ctypes.c_void_p(base.ggml_init(GgmlInit(room, None, False)))

    def tensor(kind, rows):
        made = base.ggml_new_tensor_2d(ctx, ctypes.c_int(kind), ctypes.c_int64(p["k"]),
                                       ctypes.c_int64(rows))
        return ctypes.c_void_p(made)

    def fill(at, rows, of):
        data = torch_filled((rows, p["k"]), of)
        ctypes.memmove(base.ggml_get_data(at), data.data_ptr(), data.numel() * of.itemsize)

    import torch

    kinds = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
    x = tensor(0, p["m"])
    fill(x, p["m"], torch.float32)
    graphs = []
    for _ in range(sets):
        w = tensor(kinds[dtype], p["n"])
        fill(w, p["n"], dtype)
        graph = ctypes.c_void_p(base.ggml_new_graph(ctx))
        base.ggml_build_forward_expand(graph, ctypes.c_void_p(base.ggml_mul_mat(ctx, w, x)))
        graphs.append(graph)

    class Owner:
        """Frees ggml's memory with the last call that refers to it."""

        def __del__(self):
            base.ggml_free(ctx)

    owner = Owner()

    def run(i, _owner=owner):
        cpu.ggml_graph_compute_with_ctx(ctx, graphs[i % sets], ctypes.c_int(threads))

    return {"mul_mat": run}


PEERS = {"torch": torch_kernels, "vLLM": vllm_kernels, "ONNX Runtime": onnxruntime_kernels,
         "OpenBLAS": openblas_kernels, "llama.cpp": ggml_kernels}
