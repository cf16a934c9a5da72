"""BatchAttention: attention over a batch of requests from their lengths and page tables.

    attention = BatchAttention()
    attention.plan(qo_offsets, kv_lens, kv_block_table, 32, 8, 128, 128, causal=True)   # per step
    o, lse = attention.run(q, (k, v))                                                   # per layer

It keeps operators (qkv.attention.Attention), one for each kind of attention that it was asked for,
and makes larger ones as batches grow.
"""

import itertools
import math
import operator
import sys
from typing import Any

import qkv

Array = Any  # of torch, NumPy, ...; a list where the host may have it

__all__ = ["BatchAttention"]

_BACKENDS = (
    "auto", "cpu", "cuda", "fa2", "fa3", "cutlass", "cudnn", "trtllm-gen", "trtllm", "xqa",
    "cute-dsl", "fmha_v2", "triton", "flashinfer", "qkv",
)
_LAYOUTS = ("NHD", "HND")
_MAX_LENGTH = 1 << 30  # of qkv_attention_limits
_LIMITS = ("max_requests", "max_tokens", "max_kv_len", "max_pages")
_SMALLEST = (8, 64, 1024, 256)  # limits of the first operator, so that the first steps fit
_CUDA = 2  # of DLDeviceType


# ---- arrays --------------------------------------------------------------------------------------


def _is_torch(x):
    return type(x).__module__.partition(".")[0] == "torch"


def _device_of(x):
    """"cuda:0" for an array on a GPU, else "cpu": lists, and pinned memory."""
    if _is_list(x) or (_is_torch(x) and not x.is_cuda):  # the others take some time to say it
        return "cpu"
    kind, index = x.__dlpack_device__()
    return f"cuda:{int(index)}" if int(kind) == _CUDA else "cpu"


def _is_list(x):
    return isinstance(x, (list, tuple, range))


def _dtype(x):
    return str(x.dtype).rpartition(".")[2]


def _is_i32_row(x):
    return not _is_list(x) and len(x.shape) == 1 and _dtype(x) == "int32"


def _host_ints(x, name):
    """A 1-D array or list on the host, as a list."""
    try:
        return x.tolist() if _is_i32_row(x) else list(map(operator.index, x))
    except TypeError:
        raise ValueError(
            f"{name}: expected a list or 1-D array of integers, got {_describe(x)}"
        ) from None


def _describe(x):
    shape = getattr(x, "shape", None)
    return f"{type(x).__name__}" if shape is None else f"{tuple(shape)} of {x.dtype}"


def _as_i32(x, name):
    """An array of integers as i32, where it is."""
    kind = _dtype(x)
    if kind == "int32":
        return x
    if kind not in ("int64", "int16", "uint8", "uint16", "uint32", "uint64", "int8"):
        raise ValueError(f"{name}: expected i32, got {x.dtype}")
    if _device_of(x) == "cpu" and math.prod(x.shape) and int(x.max()) > 0x7FFFFFFF:
        raise ValueError(f"{name}: expected values below 2^31, got {int(x.max())}")
    return x.int() if _is_torch(x) else x.astype("int32")


def _copy(x):
    if x is None or isinstance(x, int):
        return x
    if _is_list(x):
        return [_copy(row) for row in x]
    return x.clone() if hasattr(x, "clone") else x.copy()


def _namespace(x):
    """Functions by their NumPy names for an array on a GPU that is not torch's."""
    find = getattr(x, "__array_namespace__", None)
    return find() if find else sys.modules[type(x).__module__.partition(".")[0]]


def _offsets(lens):
    """[requests + 1] i32 running sums from 0, where lens is."""
    if _is_list(lens):
        return [0, *itertools.accumulate(lens)]
    if _is_torch(lens):
        torch = sys.modules["torch"]
        out = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens.device)
        torch.cumsum(lens, 0, dtype=torch.int32, out=out[1:])
        return out
    xp = _namespace(lens)
    return xp.concatenate([xp.zeros(1, "int32"), xp.cumsum(lens, dtype="int32")])


def _ceil_div(lens, n):
    return [-(-x // n) for x in lens] if _is_list(lens) else (lens + (n - 1)) // n


def _last_page_len(lens, pages, page_size):
    """Tokens in the last page; page_size for a request without keys, where nobody looks at it."""
    if _is_list(lens):
        return [n - (p - 1) * page_size for n, p in zip(lens, pages)]
    return lens - (pages - 1) * page_size


# ---- custom masks --------------------------------------------------------------------------------


def _pack_bits(bits):
    """A flat bool array or list as bytes, the lowest bit first."""
    if _is_list(bits):
        return [
            sum(1 << b for b, bit in enumerate(bits[at : at + 8]) if bit)
            for at in range(0, len(bits), 8)
        ]
    if _is_torch(bits):
        torch = sys.modules["torch"]
        padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)
    return _namespace(bits).packbits(bits, bitorder="little")


def _concatenate(parts):
    if _is_list(parts[0]):
        return [x for part in parts for x in part]
    if _is_torch(parts[0]):
        return sys.modules["torch"].cat(parts)
    return _namespace(parts[0]).concatenate(parts)


def _flatten_mask(mask, r):
    """One request's mask, [qo_len, kv_len] or flat."""
    if _is_list(mask):
        return [x for row in mask for x in row] if mask and _is_list(mask[0]) else list(mask)
    if _dtype(mask) != "bool":
        raise ValueError(f"custom_mask[{r}]: expected bool, got {mask.dtype}")
    return mask.reshape(-1)


def _split_mask(mask, sizes):
    """The masks of requests with so many bits out of one that has all of them."""
    flat = _flatten_mask(mask, 0)
    ends = _offsets(sizes)
    if len(flat) != ends[-1]:
        raise ValueError(
            f"custom_mask: expected {ends[-1]} entries, qo_len x kv_len of all requests, "
            f"got {len(flat)}"
        )
    return [flat[a:b] for a, b in zip(ends, ends[1:])]


def _pack_mask(mask, sizes):
    """(mask_bits, mask_indptr) of any form that custom_mask takes. sizes: bits of each request, or
    None where lengths are on the GPU."""
    if isinstance(mask, tuple) and len(mask) == 2 and not _is_list(mask[0]):
        if _dtype(mask[0]) == "uint8":
            return mask
    if not _is_list(mask) or (mask and isinstance(mask[0], bool)):
        if sizes is None:
            raise ValueError(
                "custom_mask: expected a list of masks, or bits and indptr, with lengths on the GPU"
            )
        mask = _split_mask(mask, sizes)
    masks = [_flatten_mask(m, r) for r, m in enumerate(mask)]
    for r, (m, size) in enumerate(zip(masks, sizes or [])):
        if len(m) != size:
            raise ValueError(
                f"custom_mask[{r}]: expected {size} entries, qo_len x kv_len, got {len(m)}"
            )
    if sizes is not None and len(masks) != len(sizes):
        raise ValueError(f"custom_mask: expected {len(sizes)} masks, one each, got {len(masks)}")
    packed = [_pack_bits(m) for m in masks]
    return _concatenate(packed) if packed else [], _offsets([len(p) for p in packed])


# ---- plans ---------------------------------------------------------------------------------------


class _Batch:
    """Lengths and page table of one step, checked as far as can be seen from here."""

    def __init__(self, qo_offsets, kv_lens, kv_block_table):
        arrays = {"qo_offsets": qo_offsets, "kv_lens": kv_lens, "kv_block_table": kv_block_table}
        where = {name: _device_of(x) for name, x in arrays.items() if x is not None}
        if len(set(where.values())) > 1:
            raise ValueError(
                "qo_offsets, kv_lens, kv_block_table: expected all on the host or all on one GPU, "
                f"got {where}"
            )
        self.device = where["qo_offsets"]
        self.on_gpu = self.device != "cpu"
        if self.on_gpu:
            self.qo, self.lens = _as_i32(qo_offsets, "qo_offsets"), _as_i32(kv_lens, "kv_lens")
            if len(self.qo.shape) != 1 or len(self.lens.shape) != 1:
                raise ValueError(
                    "qo_offsets, kv_lens: expected [requests + 1] and [requests], got "
                    f"{tuple(self.qo.shape)} and {tuple(self.lens.shape)}"
                )
        else:
            self.qo = _host_ints(qo_offsets, "qo_offsets")
            self.lens = _host_ints(kv_lens, "kv_lens")
        # For the operator, which reads arrays faster than lists.
        self.given = [
            given if _is_i32_row(given) else values
            for given, values in ((qo_offsets, self.qo), (kv_lens, self.lens))
        ]
        self.requests = len(self.lens)
        if len(self.qo) != self.requests + 1:
            raise ValueError(
                f"qo_offsets: expected {self.requests + 1} entries for the {self.requests} requests"
                f" of kv_lens, got {len(self.qo)}"
            )
        self._read_table(kv_block_table)
        if not self.on_gpu:
            self._check_lengths()

    def _read_table(self, table):
        self.ragged = table is None
        self.padded = False
        self.table = table
        if table is None:
            return
        if _is_list(table):
            self.padded = len(table) > 0 and not isinstance(table[0], int)
            rows = len(table)
            self.entries = sum(map(len, table)) if self.padded else rows
        else:
            self.table = _as_i32(table, "kv_block_table")
            if len(table.shape) not in (1, 2):
                raise ValueError(
                    "kv_block_table: expected [pages] or [requests, columns], got "
                    f"{tuple(table.shape)}"
                )
            self.padded = len(table.shape) == 2
            rows = table.shape[0]
            self.entries = math.prod(table.shape)
        if self.padded and rows != self.requests:
            raise ValueError(
                f"kv_block_table: expected {self.requests} rows, one a request, got {rows}"
            )

    def _check_lengths(self):
        least = min(self.lens, default=0)
        if least < 0:
            r = self.lens.index(least)
            raise ValueError(f"kv_lens: expected >= 0, got {least} (request {r})")
        if self.qo[0] != 0:
            raise ValueError(f"qo_offsets: expected a first entry of 0, got {self.qo[0]}")
        self.qo_lens = list(map(operator.sub, self.qo[1:], self.qo))
        least = min(self.qo_lens, default=0)
        if least < 0:
            r = self.qo_lens.index(least)
            raise ValueError(f"qo_offsets: expected entries that do not fall (request {r})")

    def keep(self):
        """Copies what the caller may change before the first run."""
        if not self.on_gpu:
            self.given = self.qo, self.lens
            self.table = _copy(self.table)

    def sizes(self):
        """Bits of each request's mask, None where lengths are on the GPU."""
        return None if self.on_gpu else [a * b for a, b in zip(self.qo_lens, self.lens)]

    def needs(self, page_size, tokens, capacity):
        """What the limits must allow, in the order of _LIMITS. On the GPU the capacity says it, or
        what the table has room for."""
        if not self.on_gpu:
            pages = 0 if self.ragged else sum(_ceil_div(self.lens, page_size))
            return self.requests, self.qo[-1], max(self.lens, default=0), pages
        kv_len, pages = capacity[2:]
        if not kv_len and self.ragged:
            raise ValueError("max_kv_len: expected with ragged keys whose lengths are on the GPU")
        if not self.ragged:
            columns = self.table.shape[-1]
            kv_len = kv_len or min(columns * page_size, _MAX_LENGTH)
            pages = pages or self.entries
        return self.requests, tokens, kv_len, pages

    def index(self, page_size):
        """The arrays as Attention.plan takes them."""
        qo, lens = self.given
        if self.ragged:
            return {"qo_indptr": qo, "kv_indptr": _offsets(self.lens)}
        if self.padded and not _is_list(self.table):
            return {"qo_indptr": qo, "block_table": self.table, "kv_lens": lens}
        pages = _ceil_div(self.lens, page_size)
        indices = self.table
        if self.padded:
            for r, (row, n) in enumerate(zip(indices, pages)):
                if len(row) < n:
                    raise ValueError(
                        f"kv_block_table: expected {n} pages for the {self.lens[r]} keys of "
                        f"request {r}, got {len(row)}"
                    )
            indices = [page for row, n in zip(indices, pages) for page in row[:n]]
        elif not self.on_gpu and self.entries < sum(pages):
            raise ValueError(
                f"kv_block_table: expected at least {sum(pages)} pages, as kv_lens say with "
                f"page_size {page_size}, got {self.entries}"
            )
        return {
            "qo_indptr": qo,
            "kv_indptr": _offsets(pages),
            "kv_indices": indices,
            "kv_last_page_len": _last_page_len(self.lens, pages, page_size),
        }


class _Plan:
    """What one call of plan said, until the next."""

    def __init__(self, batch, spec, values, args, variant, mask, few_rows, num_tokens):
        self.batch = batch
        self.spec = spec  # of Attention; what the first run will say is None
        self.values = values  # of every run
        self.args = args  # of the variant, by name
        self.variant = variant
        self.has_no_softmax = variant is not None and "VARIANT_NO_SOFTMAX" in variant.source
        self.mask = mask  # (bits, indptr) or None
        self.few_rows = few_rows  # no request has more than one row
        self.num_tokens = num_tokens  # rows of q as the caller says, or None
        self.attention = None  # where the plan is in force
        self.rows = None  # of q, that a plan of lengths on the GPU was made for
        self.is_settled = False  # runs need not look at it any more


def _integer(name, value, least):
    if not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name}: expected an integer, {least} or more, got {value!r}")
    return operator.index(value)


def _read_rope(pos_encoding, theta, scale):
    if pos_encoding is None or isinstance(pos_encoding, qkv.Rope):
        return pos_encoding
    word = pos_encoding.lower() if isinstance(pos_encoding, str) else pos_encoding
    if word == "none":
        return None
    if word == "rope":
        return qkv.Rope(theta=theta, scale=scale)
    raise ValueError(
        f"pos_encoding: expected None, 'none', 'rope' or a qkv.Rope, got {pos_encoding!r}"
    )


def _per_head(value):
    """Is there one f32 a query head, and which: an array, or True (each run brings one)?"""
    if value is None or value is False:
        return False, None
    return True, None if value is True else value


def _read_parameters(variant, given, method):
    """Those of a variant by name, what is left of the arguments of a call."""
    names = [param[0] for param in variant.params] if variant else []
    for name in given:
        if name not in names:
            of = f" or a parameter of variant {variant.name}" if variant else ""
            raise TypeError(f"{method}: {name!r} is not an argument{of}")
    return given


def _key(spec):
    """What operators are told apart by. Scale and cap are each run's."""
    variant = spec["variant"]
    if variant is not None:
        variant = (variant.name, variant.source, tuple(map(tuple, variant.params)))
    cap = spec["logits_soft_cap"] > 0
    return tuple({**spec, "variant": variant, "logits_soft_cap": cap}.values())


def _round_up(n):
    return 1 << max(n - 1, 0).bit_length()


def _capturing(device):
    torch = sys.modules.get("torch")
    return device != "cpu" and torch is not None and torch.cuda.is_current_stream_capturing()


# ---- the wrapper ---------------------------------------------------------------------------------


class BatchAttention:
    """Attention over a batch of requests: prefill, decode, or both at once.

    backend         a hint, one of the names in use ("auto", "cutlass", "fa2", "fa3", ...): the
                    library chooses by device and problem
    kv_layout       "NHD": pages are [page_size, num_kv_heads, head_dim]; "HND": heads first
    lse_base_2      lse in base 2 instead of natural log
    batch_invariant a request's bits do not depend on its neighbours
    device          "cpu", "cuda:0", ...; None = that of the first run's q, or of tables on a GPU
    ctx             the qkv.Context to use; None = the device's default one
    max_requests, max_tokens, max_kv_len, max_pages
                    how large a step may get: requests, rows of q, keys of a request, pages of all
                    requests. 0 = grows when needed, by doubling. For CUDA graphs give all four:
                    then nothing has to grow while a stream is captured, which is an error

    CUDA graphs: replays read what plan and run were captured with, so keep this object and the
    arrays on the GPU that it was given as long as the graph. Capture plan too if lengths and tables
    are on the GPU (a custom mask then as packed bits there); else plan before each replay.
    """

    def __init__(
        self, backend: str = "auto", *, kv_layout: str = "NHD", lse_base_2: bool = False,
        batch_invariant: bool = False, max_requests: int = 0, max_tokens: int = 0,
        max_kv_len: int = 0, max_pages: int = 0, device: Any = None,
        ctx: "qkv.Context | None" = None,
    ):
        if backend not in _BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
        if kv_layout not in _LAYOUTS:
            raise ValueError(f"kv_layout: expected 'NHD' or 'HND', got {kv_layout!r}")
        self._always = {
            "kv_layout": kv_layout, "lse_base_2": lse_base_2, "batch_invariant": batch_invariant,
        }
        capacity = max_requests, max_tokens, max_kv_len, max_pages
        self._capacity = [_integer(name, n, 0) for name, n in zip(_LIMITS, capacity)]
        self._ctx = ctx
        self._device = None if device is None else str(device)
        if self._device == "cuda":
            self._device = "cuda:0"
        self._seen = {}  # of the last run: dtype_q, dtype_kv, page_size
        self._operators = {}  # (spec, few_rows) -> (Attention, limits)
        self._captured = []  # plans that graphs may hold the addresses of
        self._plan = None

    # ---- plan

    def plan(
        self, qo_offsets: Array, kv_lens: Array, kv_block_table: Array | None,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, head_dim_vo: int | None = None,
        dtype_q: Any = None, dtype_kv: Any = None, dtype_o: Any = None, *, causal: bool = False,
        sm_scale: float | None = None, window_left: int = -1, window_right: int = -1,
        logits_soft_cap: float | None = None, alibi_slopes: Array | bool | None = None,
        sink: Array | bool | None = None, custom_mask: Any = None,
        pos_encoding: "qkv.Rope | str | None" = None, rope_theta: float = 10000.0,
        rope_scale: float = 1.0, variant: "qkv.Variant | None" = None,
        page_size: int | None = None, num_tokens: int | None = None, max_qo_len: int = 0,
        stream: int | None = None, **parameters: Any,
    ) -> None:
        """Takes one step's lengths and page tables; runs use them until the next plan.

        qo_offsets      i32 [requests + 1] offsets of each request's rows in q, from 0
        kv_lens         i32 [requests] keys of each request, with those of its new tokens
        kv_block_table  i32 [requests, columns] page numbers, padded; or [pages], those of request
                        0, then of request 1, ...; or None: k and v are [keys, heads, dim], one
                        request after the other
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo   as in qkv.attention.Attention
        dtype_q, dtype_kv, dtype_o   "bf16" or torch.bfloat16, ...; None = those of the first run's
                        q and k, and dtype_q
        causal          row i of a request sees the keys up to kv_len - qo_len + i
        window_left, window_right   keys visible beside the row's own, -1 = all
        logits_soft_cap cap * tanh(logit / cap); None or 0 = no cap
        alibi_slopes, sink   f32 [num_qo_heads], or True: each run brings its own
        custom_mask     True = visible: bool, [qo_len * kv_len] of all requests one after the other,
                        or a list with one a request ([qo_len, kv_len] or flat), or packed: (u8
                        bits, lowest first, i64 [requests + 1] offsets in bytes). With causal, both
                        hold
        pos_encoding    None, "rope" (with rope_theta, rope_scale) or a qkv.Rope: the cache holds
                        keys that are not rotated
        variant         a qkv.Variant; its parameters by name, here or at each run
        page_size       tokens a page. None: 1 with a packed table, else that of the first run's k
        num_tokens      rows of q in the runs to come, where lengths are on the GPU. None: each run
                        that brings another number plans again
        max_qo_len      1 where lengths are on the GPU and no request has more than one row

        Arrays are all on the host (lists too, and free afterwards) or all on one GPU, where they
        are read in place until the last run of the plan has executed.
        """
        num_qo_heads = _integer("num_qo_heads", num_qo_heads, 1)
        num_kv_heads = _integer("num_kv_heads", num_kv_heads, 1)
        head_dim_qk = _integer("head_dim_qk", head_dim_qk, 1)
        if num_qo_heads % num_kv_heads:
            raise ValueError(
                f"num_qo_heads: expected a multiple of num_kv_heads ({num_kv_heads}), "
                f"got {num_qo_heads}"
            )
        batch = _Batch(qo_offsets, kv_lens, kv_block_table)
        if batch.on_gpu and self._device not in (None, batch.device):
            raise ValueError(
                f"qo_offsets: expected on {self._device} or the host, got {batch.device}"
            )
        if batch.ragged and page_size:
            raise ValueError(f"page_size: expected None without kv_block_table, got {page_size}")
        if page_size is not None and not batch.ragged:
            page_size = _integer("page_size", page_size, 1)
        if page_size is None and not batch.padded:
            page_size = 0 if batch.ragged else 1
        has_alibi, alibi_slopes = _per_head(alibi_slopes)
        has_sink, sink = _per_head(sink)
        mask = None if custom_mask is None else _pack_mask(custom_mask, batch.sizes())
        window_left = _integer("window_left", window_left, -1)
        window_right = _integer("window_right", window_right, -1)
        if mask is not None and causal:
            window_right = 0
        spec = {
            "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads,
            "head_dim_qk": head_dim_qk,
            "head_dim_vo": head_dim_qk if head_dim_vo is None else head_dim_vo,
            "page_size": page_size,
            "dtype_q": dtype_q, "dtype_kv": dtype_kv, "dtype_o": dtype_o,
            "mask": "custom" if mask is not None else "causal" if causal else "none",
            "logits_soft_cap": logits_soft_cap or 0.0,
            "window_left": window_left, "window_right": window_right,
            "alibi": has_alibi, "sink": has_sink,
            "rope": _read_rope(pos_encoding, rope_theta, rope_scale),
            "variant": variant, **self._always,
        }
        values = {
            "sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap,
            "alibi_slopes": alibi_slopes, "sink": sink,
        }
        values = {name: x for name, x in values.items() if x is not None}
        few_rows = max_qo_len == 1 if batch.on_gpu else max(batch.qo_lens, default=0) <= 1
        plan = _Plan(
            batch, spec, values, _read_parameters(variant, parameters, "plan"), variant, mask,
            few_rows, num_tokens,
        )
        self._complete(plan)
        if not self._commit(plan, stream):
            batch.keep()
        self._plan = plan

    def _complete(self, plan, q=None, k=None):
        """Fills in what was left to the first run: from q and k, or from the run before."""
        spec = plan.spec
        seen = dict(self._seen)
        if q is not None:
            seen = {"dtype_q": q.dtype, "dtype_kv": k.dtype}
            if len(k.shape) > 3:
                # [pages, (2,) page_size, heads, dim], or heads before page_size
                seen["page_size"] = k.shape[-3 if spec["kv_layout"] == "NHD" else -2]
            self._device = self._device or _device_of(q)
        for name in ("dtype_q", "dtype_kv", "page_size"):
            if spec[name] is None:
                spec[name] = seen.get(name)
        if q is not None and spec["page_size"] is None:
            raise ValueError(f"k: expected [pages, page_size, heads, dim], got {tuple(k.shape)}")
        if spec["dtype_o"] is None:
            spec["dtype_o"] = spec["dtype_q"]
        self._seen = seen

    def _commit(self, plan, stream, rows=None):
        """Puts a plan in force on an operator that it fits. False if a run must say more first."""
        spec, batch = plan.spec, plan.batch
        device = batch.device if batch.on_gpu else self._device
        unknown = spec["page_size"] is None or spec["dtype_q"] is None or spec["dtype_kv"] is None
        if device is None or unknown:
            return False
        key = (device, plan.few_rows, *_key(spec))
        rows = plan.num_tokens or rows
        if batch.on_gpu and not rows:
            # Whatever rows the run has: a graph may be replayed without one.
            rows = self._operators[key][1][1] if key in self._operators else self._capacity[1]
            if not rows:
                return False
        needs = batch.needs(spec["page_size"], rows, self._capacity)
        attention = self._operator(key, spec, device, plan.few_rows, needs)
        arrays = batch.index(spec["page_size"])
        if plan.mask is not None:
            bits, indptr = plan.mask
            arrays["mask_bits"] = _to_device(bits, device, "uint8")
            arrays["mask_indptr"] = _to_device(indptr, batch.device, "int64")
        if batch.on_gpu:
            arrays["max_tokens"] = rows
        attention.plan(**arrays, stream=stream)
        plan.attention, plan.rows = attention, rows
        plan.arrays = arrays  # read in place on a GPU
        self._device = device
        return True

    def _operator(self, key, spec, device, few_rows, needs):
        """The operator for a spec, made or made larger where it is too small."""
        attention, have = self._operators.get(key, (None, (0, 0, 0, 0)))
        if attention is not None and all(n <= h for n, h in zip(needs, have)):
            return attention
        if _capturing(device):
            too_small = [
                f"{name} ({n} is wanted, {h} is there)"
                for name, n, h in zip(_LIMITS, needs, have) if n > h
            ]
            raise RuntimeError(
                f"{', '.join(too_small)}: cannot grow while a CUDA graph is captured; give "
                "BatchAttention the largest values, and plan once before the capture"
            )
        limits = []
        for n, h, capacity, smallest in zip(needs, have, self._capacity, _SMALLEST):
            grown = capacity or smallest
            if n > grown:
                grown = max(n, min(_round_up(n), _MAX_LENGTH))
            limits.append(max(h, grown))
        from qkv.attention import Attention  # which imports this module

        attention = Attention(
            **spec, **dict(zip(_LIMITS, limits)), max_qo_len=1 if few_rows else 0, ctx=self._ctx,
            device=device,
        )
        self._operators[key] = attention, limits
        return attention

    # ---- run

    def run(
        self, q: Array, kv: tuple[Array, Array] | Array, *, out: Array | None = None,
        lse: Array | bool | None = None, sm_scale: float | None = None,
        logits_soft_cap: float | None = None, window_left: int | None = None,
        window_right: int | None = None, q_scale: float | Array | None = None,
        k_scale: float | Array | None = None, v_scale: float | Array | None = None,
        o_scale: float | Array | None = None, sink: Array | None = None,
        alibi_slopes: Array | None = None, stream: int | None = None, **parameters: Any,
    ) -> tuple[Array, Array | None]:
        """Computes one layer under the current plan. Returns (o, lse).

        q       [tokens, num_qo_heads, head_dim_qk]
        kv      (k, v): [pages, page_size, num_kv_heads, head_dim] by kv_layout; with page_size 1
                also [tokens, num_kv_heads, head_dim]; or one array of both, [pages, 2, ...]
        out     [tokens, num_qo_heads, head_dim_vo] to write o to; None = a new one
        lse     f32 [tokens, num_qo_heads] to write to; None = a new one; False = not wanted, None
                is returned in its place, as with a variant without softmax
        q_scale, k_scale, v_scale, o_scale   numbers or f32 [1] or [heads]
        others  this layer's instead of plan's; a window may only be narrower
        """
        plan = self._plan
        if plan is None:
            raise ValueError("run: expected a plan first, got none")
        k, v = kv if isinstance(kv, (tuple, list)) else (kv, None)
        if plan.spec["page_size"] == 1 and len(k.shape) == 3:
            at = 1 if plan.spec["kv_layout"] == "NHD" else 2
            k, v = _with_page_axis(k, at), None if v is None else _with_page_axis(v, at)
        if not plan.is_settled:
            self._settle(plan, q, k, stream)
        values = plan.values
        if not (
            sm_scale is logits_soft_cap is q_scale is k_scale is v_scale is o_scale is sink
            is alibi_slopes is None
        ):
            layer = {
                "sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap, "q_scale": q_scale,
                "k_scale": k_scale, "v_scale": v_scale, "o_scale": o_scale, "sink": sink,
                "alibi_slopes": alibi_slopes,
            }
            values = {**values, **{name: x for name, x in layer.items() if x is not None}}
        if window_left is not None or window_right is not None:
            values = {**values, "window": self._override_window(plan, window_left, window_right)}
        if plan.variant is not None or parameters:
            given = _read_parameters(plan.variant, parameters, "run")
            values = {**values, "args": {**plan.args, **given}}
            if plan.has_no_softmax:
                lse = False
        run = plan.attention.run
        if lse is False:
            return run(q, k, v, o=out, stream=stream, **values), None
        return run(q, k, v, o=out, lse=True if lse is None else lse, stream=stream, **values)

    def _settle(self, plan, q, k, stream):
        """What a run must do before it computes, until nothing is left to be done."""
        on_gpu = plan.batch.on_gpu
        if plan.attention is None:
            self._complete(plan, q, k)
            self._commit(plan, stream, q.shape[0])
        elif on_gpu and not plan.num_tokens and plan.rows != q.shape[0]:
            self._commit(plan, stream, q.shape[0])
        if self._device == "cpu":
            plan.is_settled = True
        elif _capturing(self._device):
            if plan not in self._captured:
                self._captured.append(plan)
            plan.is_settled = not on_gpu or bool(plan.num_tokens)

    def _override_window(self, plan, left, right):
        spec = plan.spec
        return (
            spec["window_left"] if left is None else _integer("window_left", left, -1),
            spec["window_right"] if right is None else _integer("window_right", right, -1),
        )

    def status(self, stream: int | None = None) -> None:
        """Waits for the stream, and raises what was wrong with the last plan's arrays on a GPU."""
        if self._plan is not None and self._plan.attention is not None:
            self._plan.attention.status(stream=stream)


def _with_page_axis(x, axis):
    return x[:, None] if axis == 1 else x[:, :, None]


def _to_device(x, device, dtype):
    """A mask's part to where kernels read it."""
    if _device_of(x) == device:
        return x
    torch = sys.modules.get("torch")
    if torch is None:
        raise ValueError(f"custom_mask: expected on {device}, got {_device_of(x)}")
    return torch.as_tensor(x, dtype=getattr(torch, dtype)).to(device)
