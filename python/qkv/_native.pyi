"""Types of the extension; help(qkv.rmsnorm) and the like say what the arguments mean."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, final, overload

from typing_extensions import Self

from . import Rope, Variant

# An array of any framework that speaks DLPack (with __dlpack__ and __dlpack_device__).
_Array: TypeAlias = Any
_A = TypeVar("_A")
# Index arrays may be nested lists too, on the host.
_Index: TypeAlias = _Array | Sequence[Any]
_Scale: TypeAlias = float | _Array | Sequence[float]
# "bf16", or a framework's own dtype.
_DType: TypeAlias = Any
_Layout: TypeAlias = Literal["NHD", "HND"]
_Mask: TypeAlias = Literal["none", "causal", "custom"]

class Error(Exception):
    status: int

class InvalidError(Error, ValueError): ...
class UnsupportedError(Error, NotImplementedError): ...
class OutOfMemoryError(Error, MemoryError): ...
class CompileError(Error): ...
class DeviceError(Error): ...
class CommError(Error): ...
class InternalError(Error): ...

@final
class Context:
    def __new__(
        cls,
        device: Any = "cpu",
        *,
        num_threads: int = 0,
        isa: str | None = None,
        jit_policy: Literal["allow", "cached", "never"] = "allow",
        batch_invariant: bool = False,
        cache_dir: str | None = None,
        compiler: str | None = None,
    ) -> Self: ...
    @property
    def device_name(self) -> str: ...
    @property
    def compiler(self) -> str: ...
    @property
    def num_threads(self) -> int: ...

def version() -> tuple[int, int, int]: ...
def context(device: Any) -> Context: ...
def empty_like(x: _A, shape: int | Sequence[int] | None = None, dtype: _DType | None = None) -> _A: ...
def rmsnorm(
    x: _A, weight: _Array, eps: float = 1e-6, weight_bias: float = 0.0, *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
) -> _A: ...
def add_rmsnorm(
    x: _A,
    residual: _Array,
    weight: _Array,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    *,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A: ...
def gated_activation(
    gate: _A, up: _Array, kind: Literal["silu", "gelu", "gelu_tanh"] = "silu", *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
) -> _A: ...
def rope(
    q: _A,
    k: _A | None = None,
    *,
    positions: _Index | None = None,
    indptr: _Index | None = None,
    offsets: _Index | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    theta: float = 10000.0,
    scale: float = 1.0,
    low_freq: float = 0.0,
    high_freq: float = 0.0,
    old_context: float = 0.0,
    q_out: _A | None = None,
    k_out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A | None]: ...
def gemm(x: _A, w: _Array, *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None) -> _A: ...
def gemm_quantized(
    x: _A, w: _Array, format: Literal["q8_0", "q4_0", "q4_1"], *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
) -> _A: ...
def argmax(logits: _A, *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None) -> _A: ...
@overload
def sample(
    rows: _A,
    *,
    seed: int | _Index,
    offset: int | _Index | None = None,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    top_p: _Scale | None = None,
    min_p: _Scale | None = None,
    typical_p: _Scale | None = None,
    kind: Literal["logits", "probs"] = "logits",
    order: Literal["top_k_first", "joint"] = "top_k_first",
    indices: _Index | None = None,
    valid: None = None,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A: ...
@overload
def sample(
    rows: _A,
    *,
    seed: int | _Index,
    offset: int | _Index | None = None,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    top_p: _Scale | None = None,
    min_p: _Scale | None = None,
    typical_p: _Scale | None = None,
    kind: Literal["logits", "probs"] = "logits",
    order: Literal["top_k_first", "joint"] = "top_k_first",
    indices: _Index | None = None,
    valid: Literal[True] | _A,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A]: ...
@overload
def renormalize(
    rows: _A,
    *,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    top_p: _Scale | None = None,
    min_p: _Scale | None = None,
    typical_p: _Scale | None = None,
    kind: Literal["logits", "probs"] = "logits",
    order: Literal["top_k_first", "joint"] = "top_k_first",
    indices: _Index | None = None,
    valid: None = None,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A: ...
@overload
def renormalize(
    rows: _A,
    *,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    top_p: _Scale | None = None,
    min_p: _Scale | None = None,
    typical_p: _Scale | None = None,
    kind: Literal["logits", "probs"] = "logits",
    order: Literal["top_k_first", "joint"] = "top_k_first",
    indices: _Index | None = None,
    valid: Literal[True] | _A,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A]: ...
@overload
def mask_logits(
    rows: _A,
    *,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    indices: _Index | None = None,
    valid: None = None,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A: ...
@overload
def mask_logits(
    rows: _A,
    *,
    temperature: _Scale | None = None,
    top_k: int | _Index | None = None,
    top_n_sigma: _Scale | None = None,
    repetition: _Scale | None = None,
    frequency: _Scale | None = None,
    presence: _Scale | None = None,
    counts: _Index | None = None,
    prompt: _Index | None = None,
    bias: _Array | Sequence[Any] | None = None,
    bitmask: _Index | None = None,
    indices: _Index | None = None,
    valid: Literal[True] | _A,
    out: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A]: ...
def top_k(
    rows: _A,
    k: int,
    *,
    sorted: bool = True,
    values: _A | None = None,
    indices: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A]: ...
@overload
def log_probs(
    logits: _A, tokens: _Index, *, ranks: None = None, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
) -> _A: ...
@overload
def log_probs(
    logits: _A, tokens: _Index, *, ranks: Literal[True] | _A, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
) -> tuple[_A, _A]: ...
def verify(
    target: _A,
    draft_tokens: _Index,
    draft: _A | None = None,
    *,
    seed: int | _Index,
    offset: int | _Index | None = None,
    parents: _Index | None = None,
    accepted: _A | None = None,
    num_accepted: _A | None = None,
    tokens: _A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[_A, _A, _A]: ...
def kv_append(
    k_cache: _Array,
    v_cache: _Array | None,
    k: _Array,
    v: _Array,
    *,
    qo_indptr: _Index,
    kv_indptr: _Index | None = None,
    kv_indices: _Index | None = None,
    kv_last_page_len: _Index | None = None,
    block_table: _Index | None = None,
    kv_lens: _Index | None = None,
    kv_layout: _Layout = "NHD",
    positions: _Index | None = None,
    k_scale: _Scale | None = None,
    v_scale: _Scale | None = None,
    rope: Rope | None = None,
    q: _A | None = None,
    q_out: _A | None = None,
    q_scale: _Scale | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A | None: ...
def kv_append_slots(
    k_cache: _Array,
    v_cache: _Array | None,
    k: _Array,
    v: _Array,
    slot_mapping: _Index,
    *,
    kv_layout: _Layout = "NHD",
    positions: _Index | None = None,
    k_scale: _Scale | None = None,
    v_scale: _Scale | None = None,
    rope: Rope | None = None,
    q: _A | None = None,
    q_out: _A | None = None,
    q_scale: _Scale | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> _A | None: ...
def kv_copy_pages(
    k_cache: _Array, v_cache: _Array | None, src: _Index, dst: _Index, *, ctx: Context | None = None, stream: int | None = None
) -> None: ...

@final
class LogitsPipe:
    def __new__(
        cls,
        stages: Sequence[tuple[str, float | None, str | None, str | None, str | None]],
        *,
        kind: Literal["logits", "probs"] = "logits",
        unfused: bool = False,
    ) -> Self: ...
    def run(
        self, rows: _A, params: Mapping[str, Any], *, out: _A | None = None, ctx: Context | None = None, stream: int | None = None
    ) -> _A | tuple[_A, _A]: ...

@final
class Attention:
    def __new__(
        cls,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        page_size: int = 0,
        kv_layout: _Layout = "NHD",
        mask: _Mask = "causal",
        dtype_q: _DType = "bf16",
        dtype_kv: _DType | None = None,
        dtype_o: _DType | None = None,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        window_left: int = -1,
        window_right: int = -1,
        alibi: bool = False,
        sink: bool = False,
        rope: Rope | None = None,
        variant: Variant | None = None,
        batch_invariant: bool = False,
        lse_base_2: bool = False,
        only_appends: bool = False,
        max_requests: int,
        max_tokens: int,
        max_qo_len: int = 0,
        max_kv_len: int,
        max_pages: int = 0,
        max_workers: int = 0,
        max_split_rows: int = 0,
        pool_pages: int = 0,
        max_levels: int = 1,
        max_row_blocks: int = 0,
        plans_in_flight: int = 0,
        ctx: Context | None = None,
        device: Any = "cpu",
    ) -> Self: ...
    @property
    def ctx(self) -> Context: ...
    def plan(
        self,
        *,
        qo_indptr: _Index | None = None,
        kv_indptr: _Index | None = None,
        kv_indices: _Index | None = None,
        kv_last_page_len: _Index | None = None,
        block_table: _Index | None = None,
        kv_lens: _Index | None = None,
        bsr_rows: int = 0,
        bsr_cols: int = 0,
        bsr_indptr: _Index | None = None,
        bsr_indices: _Index | None = None,
        bsr_mask: _Index | None = None,
        levels: Sequence[Mapping[str, Any]] | None = None,
        qo_pos: _Index | None = None,
        mask_bits: _Index | None = None,
        mask_indptr: _Index | None = None,
        detect_shared_prefix: bool = False,
        max_tokens: int = 0,
        stream: int | None = None,
    ) -> None: ...
    @overload
    def run(
        self,
        q: _A,
        k: _Array,
        v: _Array | None = None,
        *,
        o: _A | None = None,
        lse: None = None,
        sm_scale: float = 0.0,
        logits_soft_cap: float = 0.0,
        window: tuple[int, int] | None = None,
        q_scale: _Scale | None = None,
        k_scale: _Scale | None = None,
        v_scale: _Scale | None = None,
        o_scale: _Scale | None = None,
        sink: _Index | None = None,
        alibi_slopes: _Index | None = None,
        args: Sequence[Any] | Mapping[str, Any] = (),
        stream: int | None = None,
    ) -> _A: ...
    @overload
    def run(
        self,
        q: _A,
        k: _Array,
        v: _Array | None = None,
        *,
        o: _A | None = None,
        lse: Literal[True] | _A,
        sm_scale: float = 0.0,
        logits_soft_cap: float = 0.0,
        window: tuple[int, int] | None = None,
        q_scale: _Scale | None = None,
        k_scale: _Scale | None = None,
        v_scale: _Scale | None = None,
        o_scale: _Scale | None = None,
        sink: _Index | None = None,
        alibi_slopes: _Index | None = None,
        args: Sequence[Any] | Mapping[str, Any] = (),
        stream: int | None = None,
    ) -> tuple[_A, _A]: ...
    def status(self, stream: int | None = None) -> None: ...

def can_run(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None = None,
    page_size: int = 0,
    kv_layout: _Layout = "NHD",
    mask: _Mask = "causal",
    dtype_q: _DType = "bf16",
    dtype_kv: _DType | None = None,
    dtype_o: _DType | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    window_left: int = -1,
    window_right: int = -1,
    alibi: bool = False,
    sink: bool = False,
    rope: Rope | None = None,
    variant: Variant | None = None,
    batch_invariant: bool = False,
    lse_base_2: bool = False,
    only_appends: bool = False,
    max_requests: int,
    max_tokens: int,
    max_qo_len: int = 0,
    max_kv_len: int,
    max_pages: int = 0,
    max_workers: int = 0,
    max_split_rows: int = 0,
    pool_pages: int = 0,
    max_levels: int = 1,
    max_row_blocks: int = 0,
    plans_in_flight: int = 0,
    ctx: Context | None = None,
    device: Any = "cpu",
) -> str: ...
def workspace_size(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None = None,
    page_size: int = 0,
    kv_layout: _Layout = "NHD",
    mask: _Mask = "causal",
    dtype_q: _DType = "bf16",
    dtype_kv: _DType | None = None,
    dtype_o: _DType | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    window_left: int = -1,
    window_right: int = -1,
    alibi: bool = False,
    sink: bool = False,
    rope: Rope | None = None,
    variant: Variant | None = None,
    batch_invariant: bool = False,
    lse_base_2: bool = False,
    only_appends: bool = False,
    max_requests: int,
    max_tokens: int,
    max_qo_len: int = 0,
    max_kv_len: int,
    max_pages: int = 0,
    max_workers: int = 0,
    max_split_rows: int = 0,
    pool_pages: int = 0,
    max_levels: int = 1,
    max_row_blocks: int = 0,
    plans_in_flight: int = 0,
    ctx: Context | None = None,
    device: Any = "cpu",
) -> tuple[int, int, int]: ...
@overload
def merge(
    o_states: Sequence[_A], lse_states: Sequence[_A], *, base_2: bool = False, o: _A | None = None, lse: None = None, ctx: Context | None = None, stream: int | None = None
) -> _A: ...
@overload
def merge(
    o_states: Sequence[_A], lse_states: Sequence[_A], *, base_2: bool = False, o: _A | None = None, lse: Literal[True] | _A, ctx: Context | None = None, stream: int | None = None
) -> tuple[_A, _A]: ...
