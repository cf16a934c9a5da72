"""The names that serving engines import from FlashInfer, over qkv's operators.

    import qkv.flashinfer
    qkv.flashinfer.install()      # from here on `import flashinfer` is this package
    import flashinfer             # on CPU tensors as on a GPU's

Signatures and meanings are FlashInfer's: log-sum-exp in base 2, packed masks with the lowest bit
first, page tables as (indptr, indices, last_page_len). Workspaces are accepted and not used;
backends are hints. What is not offered raises NotImplementedError naming it.
"""

from __future__ import annotations

import sys
from types import ModuleType

from . import logits_processor as logits_processor
from ._missing import NotOffered as NotOffered, missing
from .activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from .attention import BatchAttention, BatchAttentionWithAttentionSinkWrapper
from .cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from .decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
    single_decode_with_kv_cache,
)
from .norm import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm
from .page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from .pod import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from .prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from .quantization import packbits, segment_packbits
from .rope import (
    apply_llama31_rope,
    apply_llama31_rope_inplace,
    apply_llama31_rope_pos_ids,
    apply_llama31_rope_pos_ids_inplace,
    apply_rope,
    apply_rope_inplace,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
)
from .sampling import (
    chain_speculative_sampling,
    min_p_sampling_from_probs,
    sampling_from_logits,
    sampling_from_probs,
    softmax,
    top_k_mask_logits,
    top_k_renorm_probs,
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs,
    top_p_renorm_probs,
    top_p_sampling_from_probs,
)
from .sparse import BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper
from .utils import next_positive_power_of_2

# The release whose signatures these are: engines compare it with the least that they need.
__version__ = "0.6.18"


def _ours(module: ModuleType | None) -> bool:
    return module is not None and module.__name__.startswith(__name__)


def install(*, force: bool = False) -> None:
    """Makes `import flashinfer`, and its submodules that are offered, resolve to this package.

    If the real package is imported already, that is an ImportError, or with force=True it is
    replaced for imports to come; what imported it before keeps it."""
    real = sys.modules.get("flashinfer")
    if real is not None and not _ours(real):
        if not force:
            raise ImportError("flashinfer is imported already: install earlier, or with force=True")
        _forget()
    for name, module in list(sys.modules.items()):
        if name == __name__ or name.startswith(f"{__name__}."):
            sys.modules[name.removeprefix("qkv.")] = module


def uninstall() -> None:
    """Takes back what install did: `import flashinfer` finds the real package, if there is one."""
    if _ours(sys.modules.get("flashinfer")):
        _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n == "flashinfer" or n.startswith("flashinfer.")]:
        del sys.modules[name]


__getattr__ = missing(__name__)

__all__ = [
    name
    for name, value in list(globals().items())
    if not name.startswith("_") and callable(value) and name not in ("missing", "ModuleType")
]
