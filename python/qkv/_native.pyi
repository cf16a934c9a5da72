"""Types of the extension; help(qkv.rmsnorm) and the like say what the arguments mean."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, overload

from . import Rope, Variant

# An array of any framework that speaks DLPack (with __dlpack__ and __dlpack_device__).
Array: TypeAlias = Any
A = TypeVar("A")
# Index arrays may be nested lists too, on the host.
Index: TypeAlias = Array | Sequence[Any]
Scale: TypeAlias = float | Array | Sequence[float]
# "bf16", or a framework's own dtype.
DType: TypeAlias = Any
Layout: TypeAlias = Literal["NHD", "HND"]
Mask: TypeAlias = Literal["none", "causal", "custom"]

class Error(Exception):
    status: int

class InvalidError(Error, ValueError): ...
class UnsupportedError(Error, NotImplementedError): ...
class OutOfMemoryError(Error, MemoryError): ...
class CompileError(Error): ...
class DeviceError(Error): ...
class CommError(Error): ...
class InternalError(Error): ...

class Context:
    def __init__(
        self,
        device: Any = "cpu",
        *,
        num_threads: int = 0,
        isa: str | None = None,
        jit_policy: Literal["allow", "cached", "never"] = "allow",
        batch_invariant: bool = False,
        cache_dir: str | None = None,
        compiler: str | None = None,
    ) -> None: ...
    @property
    def device_name(self) -> str: ...
    @property
    def compiler(self) -> str: ...
    @property
    def num_threads(self) -> int: ...

def version() -> tuple[int, int, int]: ...
def context(device: Any) -> Context: ...
def empty_like(x: A, shape: int | Sequence[int] | None = None, dtype: DType | None = None) -> A: ...
def rmsnorm(
    x: A, weight: Array, eps: float = 1e-6, weight_bias: float = 0.0, *, out: A | None = None, ctx: Context | None = None, stream: int | None = None
) -> A: ...
def add_rmsnorm(
    x: A,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    *,
    out: A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> A: ...
def gated_activation(
    gate: A, up: Array, kind: Literal["silu", "gelu", "gelu_tanh"] = "silu", *, out: A | None = None, ctx: Context | None = None, stream: int | None = None
) -> A: ...
def rope(
    q: A,
    k: A | None = None,
    *,
    positions: Index | None = None,
    indptr: Index | None = None,
    offsets: Index | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    theta: float = 10000.0,
    scale: float = 1.0,
    low_freq: float = 0.0,
    high_freq: float = 0.0,
    old_context: float = 0.0,
    q_out: A | None = None,
    k_out: A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> tuple[A, A | None]: ...
def gemm(x: A, w: Array, *, out: A | None = None, ctx: Context | None = None, stream: int | None = None) -> A: ...
def gemm_quantized(
    x: A, w: Array, format: Literal["q8_0", "q4_0", "q4_1"], *, out: A | None = None, ctx: Context | None = None, stream: int | None = None
) -> A: ...
def argmax(logits: A, *, out: A | None = None, ctx: Context | None = None, stream: int | None = None) -> A: ...
def sample(
    logits: A,
    *,
    seed: int | Index,
    offset: int | Index | None = None,
    temperature: Scale | None = None,
    top_k: int | Index | None = None,
    top_p: Scale | None = None,
    min_p: Scale | None = None,
    out: A | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> A: ...
def kv_append(
    k_cache: Array,
    v_cache: Array | None,
    k: Array,
    v: Array,
    *,
    qo_indptr: Index,
    kv_indptr: Index | None = None,
    kv_indices: Index | None = None,
    kv_last_page_len: Index | None = None,
    block_table: Index | None = None,
    kv_lens: Index | None = None,
    kv_layout: Layout = "NHD",
    positions: Index | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    rope: Rope | None = None,
    q: A | None = None,
    q_out: A | None = None,
    q_scale: Scale | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> A | None: ...
def kv_append_slots(
    k_cache: Array,
    v_cache: Array | None,
    k: Array,
    v: Array,
    slot_mapping: Index,
    *,
    kv_layout: Layout = "NHD",
    positions: Index | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    rope: Rope | None = None,
    q: A | None = None,
    q_out: A | None = None,
    q_scale: Scale | None = None,
    ctx: Context | None = None,
    stream: int | None = None,
) -> A | None: ...
def kv_copy_pages(
    k_cache: Array, v_cache: Array | None, src: Index, dst: Index, *, ctx: Context | None = None, stream: int | None = None
) -> None: ...

class Attention:
    def __init__(
        self,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        page_size: int = 0,
        kv_layout: Layout = "NHD",
        mask: Mask = "causal",
        dtype_q: DType = "bf16",
        dtype_kv: DType | None = None,
        dtype_o: DType | None = None,
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
    ) -> None: ...
    @property
    def ctx(self) -> Context: ...
    def plan(
        self,
        *,
        qo_indptr: Index | None = None,
        kv_indptr: Index | None = None,
        kv_indices: Index | None = None,
        kv_last_page_len: Index | None = None,
        block_table: Index | None = None,
        kv_lens: Index | None = None,
        bsr_rows: int = 0,
        bsr_cols: int = 0,
        bsr_indptr: Index | None = None,
        bsr_indices: Index | None = None,
        bsr_mask: Index | None = None,
        levels: Sequence[Mapping[str, Any]] | None = None,
        qo_pos: Index | None = None,
        mask_bits: Index | None = None,
        mask_indptr: Index | None = None,
        detect_shared_prefix: bool = False,
        max_tokens: int = 0,
        stream: int | None = None,
    ) -> None: ...
    @overload
    def run(
        self,
        q: A,
        k: Array,
        v: Array | None = None,
        *,
        o: A | None = None,
        lse: None = None,
        sm_scale: float = 0.0,
        logits_soft_cap: float = 0.0,
        window: tuple[int, int] | None = None,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        o_scale: Scale | None = None,
        sink: Index | None = None,
        alibi_slopes: Index | None = None,
        args: Sequence[Any] | Mapping[str, Any] = (),
        stream: int | None = None,
    ) -> A: ...
    @overload
    def run(
        self,
        q: A,
        k: Array,
        v: Array | None = None,
        *,
        o: A | None = None,
        lse: Literal[True] | A,
        sm_scale: float = 0.0,
        logits_soft_cap: float = 0.0,
        window: tuple[int, int] | None = None,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        o_scale: Scale | None = None,
        sink: Index | None = None,
        alibi_slopes: Index | None = None,
        args: Sequence[Any] | Mapping[str, Any] = (),
        stream: int | None = None,
    ) -> tuple[A, A]: ...
    def status(self, stream: int | None = None) -> None: ...

def can_run(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    max_requests: int,
    max_tokens: int,
    max_kv_len: int,
    **others: Any,
) -> str: ...
def workspace_size(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    max_requests: int,
    max_tokens: int,
    max_kv_len: int,
    **others: Any,
) -> tuple[int, int, int]: ...
@overload
def merge(
    o_states: Sequence[A], lse_states: Sequence[A], *, base_2: bool = False, o: A | None = None, lse: None = None, ctx: Context | None = None, stream: int | None = None
) -> A: ...
@overload
def merge(
    o_states: Sequence[A], lse_states: Sequence[A], *, base_2: bool = False, o: A | None = None, lse: Literal[True] | A, ctx: Context | None = None, stream: int | None = None
) -> tuple[A, A]: ...
