"""qkv.ops: the torch operators against eager torch in float64, under torch.compile and CUDA graphs."""

import shutil
import sys

import pytest

torch = pytest.importorskip("torch")

import qkv  # noqa: E402
import qkv.attention  # noqa: E402
import reference  # noqa: E402
from qkv import ops  # noqa: E402

HEADS, KV_HEADS, DIM, PAGE, HIDDEN, INNER = 4, 2, 16, 4, 64, 96
EPS, THETA = 1e-5, 10000.0


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def i32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- A decoder layer of these operators, and the same one of torch in float64


class Layer(torch.nn.Module):
    """RMSNorm, QKV, RoPE, KV append, attention, output projection, RMSNorm, gated MLP."""

    def __init__(self, handle: int):
        super().__init__()
        self.handle = handle
        shapes = {
            "qkv_proj": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            "o_proj": (HIDDEN, HEADS * DIM),
            "gate_up": (2 * INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape) / shape[1] ** 0.5)
        self.register_buffer("norm_1", 1 + 0.1 * torch.randn(HIDDEN))
        self.register_buffer("norm_2", 1 + 0.1 * torch.randn(HIDDEN))

    def forward(self, x, residual, positions, slots, k_cache, v_cache):
        h = ops.add_rmsnorm(x, residual, self.norm_1, EPS)
        q, k, v = ops.gemm(h, self.qkv_proj).split(
            [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1
        )
        q, k = ops.rope(
            q.view(-1, HEADS, DIM), k.view(-1, KV_HEADS, DIM), positions=positions, theta=THETA
        )
        ops.kv_append_slots(k_cache, v_cache, k, v.view(-1, KV_HEADS, DIM), slots)
        o = ops.attention_run(self.handle, q, k_cache, v_cache)
        h = ops.gemm(o.view(-1, HEADS * DIM), self.o_proj)
        h = ops.add_rmsnorm(h, residual, self.norm_2, EPS)
        gate, up = ops.gemm(h, self.gate_up).chunk(2, dim=1)
        return ops.gemm(ops.gated_activation(gate, up), self.down)


def reference_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def reference_layer(layer, x, residual, positions, requests, history):
    """The layer in float64. requests: rows of each; history: keys and values before, of each."""
    w = {name: buffer.double() for name, buffer in layer.named_buffers()}
    residual = residual.double() + x.double()
    qkv_rows = reference_norm(residual, w["norm_1"]) @ w["qkv_proj"].T
    q, k, v = qkv_rows.view(len(x), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    q, k = (reference.rotate(x, positions, THETA) for x in (q, k))
    o = torch.empty_like(q)
    for rows, (k_before, v_before) in zip(requests, history):
        keys, values = torch.cat([k_before.double(), k[rows]]), torch.cat([v_before.double(), v[rows]])
        allowed = reference.visible(len(q[rows]), len(keys), right=0)
        o[rows] = reference.attention(q[rows], keys, values, allowed=allowed)[0].to(o.device)
    residual += o.flatten(1) @ w["o_proj"].T
    gate, up = (reference_norm(residual, w["norm_2"]) @ w["gate_up"].T).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ w["down"].T, residual


def make_attention(device, **changes):
    options = dict(
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim_qk=DIM,
        page_size=PAGE,
        dtype_q="f32",
        max_requests=8,
        max_tokens=64,
        max_kv_len=64,
        max_pages=64,
        device=device,
    )
    return qkv.attention.Attention(**{**options, **changes})


class Step:
    """One step of a batch: rows of two prefills (one with a history) and of one decode."""

    def __init__(self, device, before=(0, 5, 7), rows=(3, 4, 1)):
        self.before, self.rows = before, rows
        self.lens = [b + n for b, n in zip(before, rows)]
        columns = [(n + PAGE - 1) // PAGE for n in self.lens]
        pages = torch.randperm(16).tolist()
        self.table = i32([[pages.pop() if c < n else 0 for c in range(max(columns))] for n in columns])
        self.positions = i32([p for b, n in zip(before, rows) for p in range(b, b + n)], device)
        slots = [self.slot(r, p) for r, n in enumerate(rows) for p in range(before[r], before[r] + n)]
        self.slots = i32(slots, device)
        # Slots that no request has may hold anything.
        self.k_cache = torch.full((16, PAGE, KV_HEADS, DIM), torch.nan, device=device)
        self.v_cache = self.k_cache.clone()
        self.history = []
        for r, n in enumerate(before):
            k, v = torch.randn(2, n, KV_HEADS, DIM, device=device)
            self.history.append((k, v))
            for p in range(n):
                page, slot = divmod(self.slot(r, p), PAGE)
                self.k_cache[page, slot], self.v_cache[page, slot] = k[p], v[p]
        total = sum(rows)
        self.x, self.residual = torch.randn(2, total, HIDDEN, device=device)
        starts = [sum(rows[:r]) for r in range(len(rows))]
        self.requests = [slice(s, s + n) for s, n in zip(starts, rows)]
        self.qo_indptr = i32([*starts, total])

    def slot(self, request, position):
        return int(self.table[request, position // PAGE]) * PAGE + position % PAGE

    def plan(self, attention):
        attention.plan(qo_indptr=self.qo_indptr, block_table=self.table, kv_lens=i32(self.lens))

    def arguments(self):
        """Fresh copies of what the layer reads and writes."""
        return (
            self.x.clone(),
            self.residual.clone(),
            self.positions,
            self.slots,
            self.k_cache.clone(),
            self.v_cache.clone(),
        )

    def reference(self, layer):
        return reference_layer(
            layer, self.x, self.residual, self.positions, self.requests, self.history
        )


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_layer_compiles_as_one_graph_and_equals_eager(backend, device):
    attention = make_attention(device)
    layer = Layer(ops.handle(attention)).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for step in (Step(device), Step(device, before=(2, 0, 6), rows=(1, 2, 5))):
        step.plan(attention)
        eager = step.arguments()
        out = layer(*eager)
        expected, residual = step.reference(layer)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(eager[1].double(), residual, rtol=1e-4, atol=1e-4)
        traced = step.arguments()
        torch.testing.assert_close(compiled(*traced), out)
        for a, b in zip(traced, eager):  # the residual and the caches are written in place
            torch.testing.assert_close(a, b, equal_nan=True)


def test_dynamo_finds_no_graph_break():
    attention = make_attention("cpu")
    step = Step("cpu")
    step.plan(attention)
    explained = torch._dynamo.explain(Layer(ops.handle(attention)))(*step.arguments())
    assert explained.graph_count == 1 and explained.graph_break_count == 0


@pytest.mark.gpu
def test_a_decoder_layer_is_captured_in_a_cuda_graph():
    attention = make_attention("cuda")
    layer = Layer(ops.handle(attention)).to("cuda")
    step = Step("cuda")
    step.plan(attention)
    arguments = step.arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are loaded and products chosen at the first call
        layer(*step.arguments())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*arguments)
    later = Step("cuda", before=(1, 4, 9), rows=(3, 4, 1))
    for target, source in zip(arguments, later.arguments()):
        target.copy_(source)
    later.plan(attention)  # a new plan for the same graph
    graph.replay()
    expected, residual = later.reference(layer)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(arguments[1].double(), residual, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_reduce_overhead_puts_the_layer_into_a_cuda_graph():
    attention = make_attention("cuda")
    layer = Layer(ops.handle(attention)).to("cuda")
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    step = Step("cuda")
    step.plan(attention)
    expected, _ = step.reference(layer)
    arguments = step.arguments()
    for x in arguments:  # torch makes no graph of what writes to arguments that may move
        torch._dynamo.mark_static_address(x)
    counters = torch._dynamo.utils.counters["inductor"]
    skipped = counters["cudagraph_skips"]
    for _ in range(3):
        for target, source in zip(arguments, step.arguments()):
            target.copy_(source)
        out = compiled(*arguments)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert counters["cudagraph_skips"] == skipped


# --- Each operator: schema, mutations, fake outputs and dynamic shapes, as torch checks them


def cases(device):
    """name -> (operator, positional arguments, keyword arguments)."""

    def x(*shape):
        return torch.randn(shape, device=device)

    def cache(n):
        # No NaN here: opcheck compares inputs before and after by value.
        return x(6, PAGE, KV_HEADS, DIM), x(6, PAGE, KV_HEADS, DIM), x(n, KV_HEADS, DIM), x(n, KV_HEADS, DIM)

    attention = make_attention(device)
    attention.plan(qo_indptr=i32([0, 2, 3]), block_table=i32([[3, 1], [5, 0]]), kv_lens=i32([6, 2]))
    handle = ops.handle(attention)
    pages = x(6, PAGE, KV_HEADS, DIM), x(6, PAGE, KV_HEADS, DIM)
    rich = make_attention(device, window_left=3, window_right=0, sink=True, logits_soft_cap=5.0)
    rich.plan(qo_indptr=i32([0, 2, 3]), block_table=i32([[3, 1], [5, 0]]), kv_lens=i32([6, 2]))
    seed = torch.arange(3, device=device).to(torch.uint64)
    csr = dict(
        qo_indptr=i32([0, 2, 3], device),
        kv_indptr=i32([0, 2, 3], device),
        kv_indices=i32([3, 1, 5], device),
        kv_last_page_len=i32([2, 2], device),
    )
    table = dict(
        qo_indptr=i32([0, 2, 3], device),
        block_table=i32([[3, 1], [5, 0]], device),
        kv_lens=i32([6, 2], device),
    )
    scale = torch.tensor([0.5], device=device)
    return {
        "rmsnorm": (ops.rmsnorm, (x(3, 32), x(32), 1e-5, 1.0), {}),
        "rmsnorm_no_rows": (ops.rmsnorm, (x(0, 32), x(32)), {}),
        "add_rmsnorm": (ops.add_rmsnorm, (x(3, 32), x(3, 32), x(32)), {}),
        "gated_activation": (ops.gated_activation, (x(3, 32), x(3, 32), "gelu_tanh"), {}),
        "rope": (ops.rope, (x(3, 4, 16), x(3, 2, 16)), dict(positions=i32([0, 7, 2], device))),
        "rope_q": (ops.rope, (x(3, 4, 16),), dict(positions=i32([0, 7, 2], device), interleaved=True)),
        "rope_indptr": (
            ops.rope,
            (x(3, 4, 16), x(3, 2, 16)),
            dict(indptr=i32([0, 1, 3], device), offsets=i32([5, 0], device), rotary_dim=8),
        ),
        "gemm": (ops.gemm, (x(3, 32), x(5, 32)), {}),
        "argmax": (ops.argmax, (x(3, 50),), {}),
        "sample": (ops.sample, (x(3, 50), seed), {}),
        "sample_filtered": (
            ops.sample,
            (x(3, 50), seed, seed),
            dict(
                temperature=torch.rand(3, device=device),
                top_k=i32([1, 5, 50], device),
                top_p=torch.full((3,), 0.9, device=device),
                min_p=torch.zeros(3, device=device),
            ),
        ),
        "sample_all": (
            ops.sample,
            (x(3, 50), seed),
            dict(
                top_n_sigma=torch.ones(3, device=device),
                repetition=torch.full((1,), 1.5, device=device),
                frequency=torch.rand(3, device=device),
                presence=torch.rand(3, device=device),
                counts=i32([[0, 1] * 25] * 3, device),
                prompt=i32([[3, 1]] * 3, device),
                bias=x(1, 50),
                bitmask=i32([[-1, 7]], device),
                typical_p=torch.full((3,), 0.9, device=device),
                indices=i32([2, 0, 0], device),
            ),
        ),
        "sample_probs": (ops.sample, (x(3, 50).abs(), seed), dict(kind="probs", order="joint")),
        "sample_valid": (ops.sample_valid, (x(3, 50), seed), dict(top_p=torch.full((1,), 0.9))),
        "renormalize": (ops.renormalize, (x(3, 50),), dict(top_k=i32([1, 5, 50], device))),
        "renormalize_indices": (ops.renormalize, (x(3, 50),), dict(indices=i32([1, 1], device))),
        "mask_logits": (ops.mask_logits, (x(3, 50),), dict(bias=x(3, 50))),
        "top_k": (ops.top_k, (x(3, 50), 4), {}),
        "top_k_by_index": (ops.top_k, (x(3, 50), 4, False), {}),
        "log_probs": (ops.log_probs, (x(3, 50), i32([[1, 2], [3, 4], [5, 6]], device)), {}),
        "verify": (
            ops.verify,
            (x(3, 3, 50).abs(), i32([[1, 2], [3, 4], [5, 6]], device), x(3, 2, 50).abs()),
            dict(seed=seed, offset=seed, parents=i32([[-1, 0]], device)),
        ),
        "kv_append_csr": (ops.kv_append, cache(3), csr),
        "kv_append_table": (ops.kv_append, cache(3), dict(table, k_scale=scale, v_scale=scale)),
        "kv_append_combined": (
            ops.kv_append,
            (x(6, 2, PAGE, KV_HEADS, DIM), None, x(3, KV_HEADS, DIM), x(3, KV_HEADS, DIM)),
            table,
        ),
        "kv_append_slots": (ops.kv_append_slots, (*cache(3), i32([4, -1, 23], device)), {}),
        "attention_run": (ops.attention_run, (handle, x(3, HEADS, DIM), *pages), {}),
        "attention_run_lse": (
            ops.attention_run_lse,
            (handle, x(3, HEADS, DIM), *pages),
            dict(sm_scale=0.1, k_scale=scale),
        ),
        "attention_run_options": (
            ops.attention_run,
            (ops.handle(rich), x(3, HEADS, DIM), *pages),
            dict(logits_soft_cap=2.0, window=[2, 0], sink=x(HEADS), v_scale=scale),
        ),
        "attention_run_combined": (
            ops.attention_run,
            (handle, x(3, HEADS, DIM), x(6, 2, PAGE, KV_HEADS, DIM)),
            {},
        ),
        "merge": (
            ops.merge,
            ([x(3, HEADS, DIM), x(3, HEADS, DIM)], [x(3, HEADS), x(3, HEADS)]),
            {},
        ),
    }


@pytest.mark.parametrize("name", sorted(cases("cpu")))
def test_torch_finds_each_operator_in_order(name, device):
    operator, args, kwargs = cases(device)[name]
    torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("name", sorted(cases("cpu")))
def test_fake_outputs_are_as_the_real_ones(name):
    operator, args, kwargs = cases("cpu")[name]
    real = operator(*args, **kwargs)
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    to_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    with mode:
        fake = operator(*to_fake[0], **to_fake[1])
    if real is None:
        assert fake is None
        return
    for a, b in zip(torch.utils._pytree.tree_leaves(real), torch.utils._pytree.tree_leaves(fake)):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_attention_output_has_the_dtype_of_the_operator():
    attention = make_attention("cpu", dtype_q="bf16", dtype_kv="f32", dtype_o="f32", head_dim_vo=8)
    attention.plan(qo_indptr=i32([0, 1]), block_table=i32([[0]]), kv_lens=i32([1]))
    q = torch.randn(1, HEADS, DIM, dtype=torch.bfloat16)
    k, v = torch.randn(1, PAGE, KV_HEADS, DIM), torch.randn(1, PAGE, KV_HEADS, 8)
    args = (ops.handle(attention), q, k, v)
    torch.library.opcheck(ops.attention_run, args, dict(dtype=torch.float32))
    out = ops.attention_run(*args, dtype=torch.float32)
    assert out.dtype == torch.float32 and out.shape == (1, HEADS, 8)
    torch.testing.assert_close(out[0], v[0, 0].repeat_interleave(HEADS // KV_HEADS, dim=0))
    with pytest.raises(ValueError, match="dtype"):  # what was traced would be of q's dtype
        ops.attention_run(*args)


# --- Values of the operators that the layer above does not use


def test_merge_of_two_halves_is_the_whole():
    q = torch.randn(3, HEADS, DIM)
    k, v = torch.randn(2, 10, KV_HEADS, DIM)
    attention = make_attention("cpu", page_size=0, mask="none", kv_layout="NHD")
    states = []
    for begin, end in ((0, 4), (4, 10)):
        attention.plan(qo_indptr=i32([0, 3]), kv_indptr=i32([begin, end]))
        states.append(ops.attention_run_lse(ops.handle(attention), q, k, v))
    out, lse = ops.merge([o for o, _ in states], [lse for _, lse in states])
    for got, expected in zip((out, lse), reference.attention(q, k, v)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_options_of_attention_reach_the_operator():
    operator, (number, *arrays), options = cases("cpu")["attention_run_options"]
    options = dict(options, sm_scale=0.2, k_scale=torch.tensor([2.0]))
    expected = ops._lookup(number).run(*arrays, **options)
    assert torch.equal(operator(number, *arrays, **options), expected)
    for name in options:
        if name != "sink":  # which the operator insists on
            less = {key: value for key, value in options.items() if key != name}
            assert not torch.equal(operator(number, *arrays, **less), expected), name


def test_argmax_and_cold_sampling_take_the_largest():
    logits = torch.randn(5, 100)
    best = logits.argmax(-1).to(torch.int32)
    seed = torch.zeros(5, dtype=torch.uint64)
    assert torch.equal(ops.argmax(logits), best)
    assert torch.equal(ops.sample(logits, seed, temperature=torch.zeros(5)), best)
    assert torch.equal(ops.sample(logits, seed, top_k=torch.ones(5, dtype=torch.int32)), best)


# --- Handles


def test_a_handle_keeps_the_operator_and_is_one_for_one():
    attention = make_attention("cpu")
    references = sys.getrefcount(attention)
    number = ops.handle(attention)
    assert sys.getrefcount(attention) == references + 1
    assert ops.handle(attention) == number
    assert ops.handle(make_attention("cpu")) != number
    ops.release(number)
    assert sys.getrefcount(attention) == references


def test_a_wrong_handle_is_refused_by_name():
    with pytest.raises(ValueError, match="handle"):
        ops.attention_run(10**9, torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8))
    number = ops.handle(make_attention("cpu"))
    ops.release(number)
    with pytest.raises(ValueError, match="handle"):
        ops.release(number)
