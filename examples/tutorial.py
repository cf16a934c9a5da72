# %% [markdown]
# # qkv from Python
#
# Four things that an inference engine does, each checked against plain torch: attention over a paged
# KV cache, a variant of attention in a few lines of C, a prefix that requests share, and the way from
# logits to tokens. Run it as a script, or cell by cell in Jupyter (jupytext) or an editor that knows
# `# %%`. It takes the GPU if torch finds one; the calls are the same.
#
# SPDX-License-Identifier: Apache-2.0

# %%
import torch

import qkv
from qkv.attention import Attention, BatchAttention

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
tolerance = 2e-2 if device == "cuda" else 1e-5
torch.manual_seed(0)


def random(*shape):
    return torch.randn(shape, dtype=dtype, device=device)


def close(got, wanted):
    return torch.allclose(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


# %% [markdown]
# The yardstick: one request in float64, without any trick. Its rows are the last of its keys' positions,
# and see what is not after them. `change` is there for the variant below.


# %%
def plain(q, k, v, change=lambda logits, row_pos, key_pos: logits):
    """q [rows, qo_heads, dim], k and v [keys, kv_heads, dim] -> [rows, qo_heads, dim]"""
    rows, keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    row_pos = torch.arange(keys - rows, keys, device=q.device)[:, None]
    key_pos = torch.arange(keys, device=q.device)
    logits = change(q @ k.mT * q.shape[-1] ** -0.5, row_pos, key_pos)
    weights = logits.masked_fill(key_pos > row_pos, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1)


# %% [markdown]
# ## 1. Decode over pages
#
# The cache is a pool of pages with 16 tokens each. A request has a list of pages, in any order, and a
# number of tokens. Here are three requests in the middle of a conversation; each is about to get one
# more token.

# %%
QO_HEADS, KV_HEADS, DIM, PAGE, POOL = 8, 2, 64, 16, 32
k_cache, v_cache = random(POOL, PAGE, KV_HEADS, DIM), random(POOL, PAGE, KV_HEADS, DIM)

block_table = torch.tensor([[3, 0, 5], [1, 7, -1], [9, -1, -1]], dtype=torch.int32)
kv_lens = torch.tensor([40, 17, 1], dtype=torch.int32)  # with the new token


def keys_and_values(request):
    """What a request has in the cache, in order."""
    pages = [page for page in block_table[request].tolist() if page >= 0]
    n = int(kv_lens[request])
    return k_cache[pages].flatten(0, 1)[:n], v_cache[pages].flatten(0, 1)[:n]


# %% [markdown]
# The new token's key and value go into the pages first. Rows of all requests lie one after the other;
# `qo_indptr` says where those of each begin.

# %%
q, k, v = random(3, QO_HEADS, DIM), random(3, KV_HEADS, DIM), random(3, KV_HEADS, DIM)
qo_indptr = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
index = {"qo_indptr": qo_indptr, "block_table": block_table, "kv_lens": kv_lens}

qkv.kv_append(k_cache, v_cache, k, v, **{name: x.to(device) for name, x in index.items()})
assert torch.equal(k_cache[5, 7], k[0]), "request 0, position 39: the eighth slot of page 5"
assert torch.equal(v_cache[9, 0], v[2])

# %% [markdown]
# Attention has three calls. The operator is made once per model: what is fixed, and how large a step
# can get. `plan` is called once per step and looks at the lengths; `run` once per layer, and only
# computes.

# %%
attention = Attention(
    num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM, page_size=PAGE, dtype_q=dtype,
    max_requests=8, max_tokens=256, max_kv_len=256, max_pages=64, device=device)
attention.plan(**index)
o = attention.run(q, k_cache, v_cache)

for r in range(3):
    assert close(o[r : r + 1], plain(q[r : r + 1], *keys_and_values(r))), r

# %% [markdown]
# Nothing about an operator says decode. In the next step requests 0 and 1 go on with a token each while
# request 2 brings the 20 tokens of a prompt: other numbers in the arrays, the same operator. (What lies
# in the pages already stands in here for keys and values that a model would have appended.)

# %%
block_table = torch.tensor([[3, 0, 5], [1, 7, -1], [9, 2, -1]], dtype=torch.int32)
kv_lens = torch.tensor([41, 18, 20], dtype=torch.int32)
rows = [slice(0, 1), slice(1, 2), slice(2, 22)]
q = random(22, QO_HEADS, DIM)

attention.plan(qo_indptr=[0, 1, 2, 22], block_table=block_table, kv_lens=kv_lens)
o, lse = attention.run(q, k_cache, v_cache, lse=True)
for r in range(3):
    assert close(o[rows[r]], plain(q[rows[r]], *keys_and_values(r))), r

# %% [markdown]
# If a model's dimensions are only known when its tensors come, `BatchAttention` makes and keeps the
# operator for you.

# %%
batch = BatchAttention()
batch.plan([0, 1, 2, 22], kv_lens, block_table, QO_HEADS, KV_HEADS, DIM, DIM, dtype_q=dtype,
           dtype_kv=dtype, dtype_o=dtype, causal=True)
again, _ = batch.run(q, (k_cache, v_cache))
assert close(again, o)

# %% [markdown]
# ## 2. An attention of your own
#
# KERPLE (Chi et al. 2022, arXiv:2205.09921, its logarithmic form) makes a score smaller the farther its
# key is away: `x - r1 * log(1 + r2 * distance)`, `r1` a number for each head. No built-in feature does
# that. A variant is the text of a C function, which becomes part of every kernel: the CPU's compiled by
# the system's `cc`, a GPU's by NVRTC, once; the result is kept on disk.

# %%
kerple = qkv.Variant(
    "kerple",
    """
    #define VARIANT_LOGIT 1
    QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
    {
        const float distance = qi_abs((float)(pos.qo_pos - pos.kv_pos));
        const float r1 = v->r1.data[pos.qo_head * v->r1.stride[0]];
        return logit - r1 * qi_log(1.f + v->r2 * distance);
    }
    """,
    params=[("r1", "f32", 1), ("r2", "f32")])

with_bias = Attention(
    num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM, page_size=PAGE, dtype_q=dtype,
    variant=kerple, max_requests=8, max_tokens=256, max_kv_len=256, max_pages=64, device=device)
with_bias.plan(qo_indptr=[0, 1, 2, 22], block_table=block_table, kv_lens=kv_lens)

r1, r2 = torch.rand(QO_HEADS, device=device) * 2, 0.3
o = with_bias.run(q, k_cache, v_cache, args=(r1, r2))


def by_distance(logits, row_pos, key_pos):
    return logits - r1.double()[:, None, None] * torch.log1p(r2 * (row_pos - key_pos).abs())


for r in range(3):
    wanted = plain(q[rows[r]], *keys_and_values(r), by_distance)
    assert close(o[rows[r]], wanted), r
    assert not close(o[rows[r]], plain(q[rows[r]], *keys_and_values(r))), r

# %% [markdown]
# ## 3. A prefix that requests share
#
# Four requests begin with the same system prompt, 64 tokens in pages 10 to 13, and have some tokens of
# their own. Levels say so: the keys of level 0 belong to groups of requests (here one group, of all four
# rows), those of the last level to each request. Shared keys are then read once instead of four times.

# %%
prefix, own, own_lens = [10, 11, 12, 13], [[14], [15], [16, 17], [18]], [3, 16, 17, 9]
q = random(4, QO_HEADS, DIM)
shared = Attention(
    num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM, page_size=PAGE, dtype_q=dtype,
    max_requests=4, max_tokens=4, max_kv_len=256, max_pages=64, max_levels=2, device=device)
shared.plan(levels=[
    {"qo_indptr": [0, 4], "kv_indptr": [0, 4], "kv_indices": prefix, "kv_last_page_len": [PAGE]},
    {"qo_indptr": [0, 1, 2, 3, 4], "kv_indptr": [0, 1, 2, 4, 5], "kv_indices": sum(own, []),
     "kv_last_page_len": [3, 16, 1, 9]},
])
o = shared.run(q, k_cache, v_cache)

block_table = torch.tensor([prefix + (pages + [-1])[:2] for pages in own], dtype=torch.int32)
kv_lens = torch.tensor([64 + n for n in own_lens], dtype=torch.int32)
for r in range(4):
    assert close(o[r : r + 1], plain(q[r : r + 1], *keys_and_values(r))), r

# %% [markdown]
# An engine that hands out the same pages to requests of the same beginning need not say it: the plan
# finds it.

# %%
shared.plan(qo_indptr=[0, 1, 2, 3, 4], block_table=block_table, kv_lens=kv_lens,
            detect_shared_prefix=True)
assert close(shared.run(q, k_cache, v_cache), o)

# %% [markdown]
# ## 4. From logits to tokens
#
# A pipe of stages, which run as one kernel. The draw depends on the seed alone, not on what else is in
# the batch.

# %%
from qkv.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopP  # noqa: E402

logits = torch.randn(4, 1000, device=device) * 4
pipe = LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])
tokens = pipe(logits, temperature=0.8, top_p=0.9, seed=42)

p, order = (logits.double() / 0.8).softmax(-1).sort(-1, descending=True)
nucleus = p.cumsum(-1) - p < 0.9 + 1e-6
for r in range(4):
    assert int(tokens[r]) in order[r][nucleus[r]].tolist()
assert torch.equal(tokens, pipe(logits, temperature=0.8, top_p=0.9, seed=42))

greedy = qkv.argmax(logits)
assert torch.equal(greedy.long(), logits.argmax(-1))
print(f"all as in plain torch, on {device}")
