"""attn_implementation="qkv": tiny random models of Transformers against eager attention."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import qkv.transformers as integration  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3Config,
    masking_utils,
)

WINDOW, NEW_TOKENS = 6, 8

COMMON = dict(
    vocab_size=99,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.3,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen3": lambda: Qwen3Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **COMMON, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=40
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture(autouse=True)
def small_steps():
    """One seed, as greedy tokens differ where two logits happen to be equal within rounding; no gradients;
    no threads that wait for each other over tiny products."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def tiny(name, device="cpu", **options):
    """A model with weights large enough for its attention to matter."""
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation="eager", dtype=torch.float32, **options
    )
    for key, weight in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(weight)
    return model.to(device).eval()


def prompts(device, side, lengths=(7, 1, 12, 4)):
    """Padded prompts of these lengths, and their mask."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = slice(max(lengths) - n, None) if side == "left" else slice(0, n)
        ids[row, where] = torch.randint(3, 99, (n,))
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def generate(model, ids, mask, **options):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def assert_same(model, run):
    """run(model) -> tensors, the same under eager and qkv."""
    model.set_attn_implementation("eager")
    expected = run(model)
    model.set_attn_implementation("qkv")
    assert model.config._attn_implementation == "qkv"
    for a, b in zip(run(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.fixture
def bounds_only(monkeypatch):
    """No boolean mask is made: the pattern is recognised."""

    def refuse(**kwargs):
        raise AssertionError("a boolean mask was made")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_of_padded_prompts_equals_eager(name, device):
    model = tiny(name, device)
    ids, mask = prompts(device, "left")

    def run(model):
        out = generate(model, ids, mask)
        return [out.sequences, *out.logits]

    assert_same(model, run)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_makes_no_mask(name, bounds_only):
    model = tiny(name)
    model.set_attn_implementation("qkv")
    generate(model, *prompts("cpu", "left"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_forward_over_padding_equals_eager(name, side, device):
    model = tiny(name, device)
    ids, mask = prompts(device, side)
    assert_same(model, lambda m: [m(input_ids=ids, attention_mask=mask).logits[mask.bool()]])


@pytest.mark.parametrize("lengths", [(1,), (WINDOW - 1,), (WINDOW, WINDOW), (WINDOW + 1,), (20, 20)])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_no_padding_and_lengths_about_the_window(name, lengths):
    model = tiny(name)
    ids, mask = prompts("cpu", "left", lengths)

    def run(model):
        out = generate(model, ids, mask)
        return [out.sequences, *out.logits, model(input_ids=ids).logits]

    assert_same(model, run)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_static_cache_equals_eager(name, device):
    model = tiny(name, device)
    ids, mask = prompts(device, "left")

    def run(model):
        out = generate(model, ids, mask, cache_implementation="static")
        return [out.sequences, *out.logits]

    assert_same(model, run)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prompt_in_chunks_equals_eager(name):
    model = tiny(name)
    ids, mask = prompts("cpu", "left", (13, 9))

    def run(model):
        cache, logits = None, []
        for begin, end in ((0, 5), (5, 6), (6, 13)):
            out = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], cache=cache)
            cache = out.cache
            logits.append(out.logits[mask[:, begin:end].bool()])
        return logits

    assert_same(model, run)


def test_padding_between_tokens_equals_eager():
    """Rows of padding see nothing here, and everything alike in eager: only real rows are compared."""
    model = tiny("gemma2")
    ids, mask = prompts("cpu", "left")
    mask[0, -3], mask[2, 4:7] = 0, 0
    seen = mask.bool()
    assert_same(model, lambda m: [m(input_ids=ids, attention_mask=mask).logits[seen]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_caller_equals_eager(dtype):
    model = tiny("llama")
    ids, _ = prompts("cpu", "left", (9, 9))
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def run(model):
        eager = model.config._attn_implementation == "eager"
        given = additive if eager or dtype != torch.bool else mask
        return [model(input_ids=ids, attention_mask=given).logits]

    assert_same(model, run)


def test_packed_sequences_equal_eager():
    """Several prompts in one row, told apart by positions alone."""
    model = tiny("llama")
    ids, _ = prompts("cpu", "left", (12,))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    assert_same(
        model, lambda m: [m(input_ids=ids, position_ids=positions, use_cache=False).logits]
    )


def test_beam_search_equals_eager():
    model = tiny("llama")
    ids, mask = prompts("cpu", "left")
    assert_same(model, lambda m: [generate(m, ids, mask, num_beams=3).sequences])


def test_an_encoder_equals_eager():
    """Rows see later keys too, up to the padding."""
    config = BertConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids, mask = prompts("cpu", "right")
    seen = mask.bool()
    assert_same(model, lambda m: [m(ids, attention_mask=mask).last_hidden_state[seen]])


def test_chunked_attention_equals_eager():
    """A pattern that is not known here."""
    config = Llama4TextConfig(
        **COMMON, intermediate_size_mlp=80, num_local_experts=2, attention_chunk_size=4
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids, mask = prompts("cpu", "left")
    assert_same(model, lambda m: [m(ids, attention_mask=mask).logits[mask.bool()]])


def test_half_precision_is_near_float32():
    model = tiny("llama")
    ids, mask = prompts("cpu", "left")
    model.set_attn_implementation("qkv")
    expected = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    logits = model.to(torch.bfloat16)(input_ids=ids, attention_mask=mask).logits
    error = (logits.float().log_softmax(-1) - expected)[mask.bool()].abs()
    assert error.mean() < 0.2


# --- The paged cache of continuous batching


def assert_batches_as_generate(model, device, **options):
    inputs = [torch.randint(3, 99, (n,)).tolist() for n in (7, 1, 12, 4, 30)]
    expected = []
    for prompt in inputs:
        ids = torch.tensor([prompt], device=device)
        out = generate(model, ids, torch.ones_like(ids)).sequences
        expected.append(out[0, len(prompt) :].tolist())
    model.set_attn_implementation("qkv")
    results = model.generate_batch(
        inputs=inputs,
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=8, num_blocks=64, max_batch_tokens=16, **options
        ),
        progress_bar=False,
    )
    assert model.config._attn_implementation == "qkv"
    generated = [results[key].generated_tokens for key in sorted(results, key=_request_number)]
    assert generated == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_equals_generate(name, device):
    """Five requests, the longest in two chunks."""
    assert_batches_as_generate(tiny(name, device), device, use_cuda_graph=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_continuous_batching_in_cuda_graphs_equals_generate(name):
    # The default implementation of experts, torch's grouped_mm, cannot be captured with f32.
    experts = {"experts_implementation": "batched_mm"} if name == "gpt_oss" else {}
    assert_batches_as_generate(tiny(name, "cuda", **experts), "cuda", use_cuda_graph=True)


def _request_number(key):
    return int(key.rsplit("_", 1)[-1])


def test_the_old_prefix_of_paged_attention_is_understood():
    model = tiny("llama")
    with pytest.warns(FutureWarning):
        model.set_attn_implementation("paged|qkv")
    assert model.config._attn_implementation == "qkv"


# --- torch.compile


def test_a_model_compiles_as_one_graph_and_equals_eager():
    model = tiny("gemma2")
    ids, mask = prompts("cpu", "left")

    def run(model):
        return [model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]]

    model.set_attn_implementation("eager")
    expected = run(model)
    model.set_attn_implementation("qkv")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected, rtol=2e-4, atol=2e-4)
    torch.compiler.reset()


# --- Strides, bounds, refusals


def test_views_of_the_usual_caches_are_read_in_place():
    batch, heads, tokens, dim = 3, 2, 5, 8
    cases = {
        "as a cache has it": torch.randn(batch, heads, tokens, dim),
        "as a projection has it": torch.randn(batch, tokens, heads, dim).transpose(1, 2),
        "the beginning of a static cache": torch.randn(batch, heads, 9, dim)[:, :, :tokens],
        "one token": torch.randn(batch, heads, 9, dim)[:, :, :1],
        "one request": torch.randn(1, heads, tokens, dim),
        "the first requests": torch.randn(4, heads, tokens, dim)[:batch],
    }
    for why, x in cases.items():
        (k, v), step = integration._in_place(x, x)
        assert k.data_ptr() == x.data_ptr(), why
        for i in range(x.shape[0]):
            assert torch.equal(k[:, i * step : i * step + x.shape[2]], x[i]), why


def test_other_strides_are_copied():
    x = torch.randn(3, 2, 5, 8)
    y = torch.randn(3, 5, 2, 8).transpose(1, 2)
    for k, v in [
        (x, y),  # requests are not as far apart
        (x[:1].expand(3, -1, -1, -1), x),
        (torch.randn(3, 2, 8, 5).transpose(2, 3), x),
    ]:
        rows, step = integration._in_place(k, v)
        for old, new in zip((k, v), rows):
            for i in range(3):
                assert torch.equal(new[:, i * step : i * step + 5], old[i])


def test_patterns_are_told_apart():
    pattern = integration._pattern
    assert pattern(masking_utils.causal_mask_function) == (True, -1)
    assert pattern(masking_utils.bidirectional_mask_function) == (False, -1)
    assert pattern(masking_utils.sliding_window_causal_mask_function(4)) == (True, 3)
    assert pattern(masking_utils.sliding_window_causal_mask_function(1)) == (True, 0)
    assert pattern(masking_utils.sliding_window_bidirectional_mask_function(4)) == (False, 4)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    causal = masking_utils.causal_mask_function
    for other in (
        chunked,
        lambda b, h, q, kv: kv <= q,
        masking_utils.or_masks(masking_utils.sliding_window_overlay(4), causal),
        masking_utils.and_masks(causal, causal),
        masking_utils.and_masks(masking_utils.sliding_window_overlay(4), causal, causal),
    ):
        assert pattern(other) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("q_len, kv_len, q_offset, kv_offset", [(5, 5, 0, 0), (2, 7, 9, 4), (3, 12, 4, 0)])
def test_bounds_are_the_boolean_mask(causal, window, q_len, kv_len, q_offset, kv_offset):
    """Attention under the bounds is attention under the mask that SDPA would get."""
    base = "causal" if causal else "bidirectional"
    if window is None:
        function = getattr(masking_utils, f"{base}_mask_function")
    else:
        function = getattr(masking_utils, f"sliding_window_{base}_mask_function")(window)
    padding = torch.ones(4, kv_len + kv_offset, dtype=torch.bool)
    padding[1, : kv_offset + 2], padding[2, -1:], padding[3] = False, False, False
    step = dict(
        batch_size=4,
        q_length=q_len,
        kv_length=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=padding,
    )
    bounds = integration.attention_mask(**step)
    assert bounds.dtype == torch.int32
    dense = masking_utils.sdpa_mask(**step, allow_is_causal_skip=False)
    q, k, v = torch.randn(4, 4, q_len, 16), torch.randn(4, 2, kv_len, 16), torch.randn(4, 2, kv_len, 8)
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double().repeat_interleave(2, 1)) / 4
    weights = scores.masked_fill(~dense, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bhij,bhjd->bihd", weights, v.double().repeat_interleave(2, 1))
    module = torch.nn.Module().eval()
    for mask in (bounds, dense):
        out, _ = integration.attention_forward(module, q, k, v, mask)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_changed_mask_is_planned_again():
    module = torch.nn.Module().eval()
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)

    def both():
        out, _ = integration.attention_forward(module, q, k, v, mask)
        return out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    torch.testing.assert_close(*both())
    mask[..., 1:] = False  # in place
    torch.testing.assert_close(*both())
    with torch.inference_mode():  # where tensors count no versions
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        torch.testing.assert_close(*both())
        mask[..., 1:] = False
        torch.testing.assert_close(*both())


@pytest.mark.gpu
def test_a_captured_layer_has_its_plan_in_the_graph():
    """Other steps use the operator between the capture and the replay, one of the same mask before both."""
    module = torch.nn.Module().eval()
    q, k, v = (torch.randn(2, 4, 5, 64, device="cuda") for _ in range(3))
    padding = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    padding[0, :2] = False
    step = dict(batch_size=2, q_length=5, kv_length=5, device="cuda")
    mask, other = (integration.attention_mask(**step, attention_mask=m) for m in (padding, None))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected, _ = integration.attention_forward(module, q, k, v, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out, _ = integration.attention_forward(module, q, k, v, mask)
        unpadded, _ = integration.attention_forward(module, q, k, v, other)
        out.zero_()
        graph.replay()
        again, _ = integration.attention_forward(module, q, k, v, other)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert torch.equal(again, unpadded) and not torch.equal(again, expected)


def test_what_is_not_offered_is_named():
    module = torch.nn.Module().eval()
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))

    def forward(mask=None, **options):
        integration.attention_forward(module, q, k, v, mask, **options)

    with pytest.raises(NotImplementedError, match="dropout"):
        forward(dropout=0.1)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        forward(output_attentions=True)
    with pytest.raises(NotImplementedError, match="position_bias"):
        forward(position_bias=torch.zeros(1, 2, 4, 4))
    with pytest.raises(NotImplementedError, match="attention_mask.*bias"):
        forward(torch.full((1, 1, 4, 4), -0.5))
    with pytest.raises(NotImplementedError, match="attention_mask.*all heads"):
        forward(torch.ones(1, 2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask.*bounds"):
        forward(torch.zeros(1, 1, 4, 4, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="sliding_window"):
        forward(sliding_window=2, is_causal=False)
    q = q.double()
    with pytest.raises(NotImplementedError, match="query.*float64"):
        forward()


def test_a_forward_may_record_gradients_but_there_is_no_backward():
    model = tiny("gpt_oss")
    ids, mask = prompts("cpu", "left")

    def run(model):
        return [model(input_ids=ids, attention_mask=mask).logits[mask.bool()]]

    with torch.enable_grad():
        assert_same(model, run)
        with pytest.raises(NotImplementedError, match="backward"):
            run(model)[0].sum().backward()


def test_torch_finds_the_operators_in_order():
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    options = (True, -1, 0.25, 0.0, None)
    mask = torch.rand(2, 1, 3, 5) < 0.5
    bounds = integration.attention_mask(2, 3, 5, q_offset=2)
    for given in (None, mask, bounds):
        torch.library.opcheck(integration._attend, (q, k, v, given, *options))
    q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 8)
    offsets = (torch.tensor(t, dtype=torch.int32) for t in ([0, 2, 2, 4], [0, 6, 6, 9]))
    torch.library.opcheck(integration._attend_packed, (q, k, v, *offsets, 2, *options))
