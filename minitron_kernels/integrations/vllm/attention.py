"""The attention backend MINITRON of vLLM's V1 engine; `paged.py` does the work.

A step's prompts and single tokens are one batch: two launches at the most, by the number of rows of
each sequence, and one more that writes the new keys by vLLM's slot mapping.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from minitron_kernels.integrations.vllm import BACKEND, paged

Tensor = torch.Tensor


class MinitronAttentionBackend(AttentionBackend):
    """What it can do; vLLM refuses it for anything else, with the reason.

    There are no quantised caches, sinks, ALiBi, soft caps, MLA, cross- or encoder attention, and no
    context parallelism. Batch invariance is not claimed: a chunk of a prompt that other requests
    cut to 8 tokens or less is computed by the decode kernel.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[MinitronAttentionImpl]:
        return MinitronAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[MinitronMetadataBuilder]:
        return MinitronMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(paged.BLOCK_SIZES)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(paged.HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability >= (8, 0))

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # which kernels are launched follows from the lengths that the host knows

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        if kv_cache_dtype in (None, "auto") or getattr(torch, kv_cache_dtype, None) == dtype:
            return None
        return f"the cache must have the model's dtype {dtype}"


class MinitronMetadataBuilder(AttentionMetadataBuilder[paged.PagedBatch]):
    # A captured launch is sized for the most rows of a sequence: batches of one length replay it.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        heads = heads or model.get_num_attention_heads(parallel)
        self.block_size: int = kv_cache_spec.block_size
        self.workspace = paged.Workspace(
            device, (heads, kv_cache_spec.num_kv_heads), kv_cache_spec.head_size
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> paged.PagedBatch:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(f"{BACKEND} is causal, vLLM asks for {common.causal}")
        least, most = paged.query_bounds(common.query_start_loc_cpu[: common.num_reqs + 1])
        most = max(most, common.max_query_len)
        table = common.block_table_tensor
        return paged.PagedBatch(
            common.num_actual_tokens,
            least,
            most,
            common.query_start_loc,
            common.seq_lens,
            table,
            common.slot_mapping,
            self.workspace.reserve(table, self.block_size, most),
        )

    def update_block_table(
        self, metadata: paged.PagedBatch, blk_table: Tensor, slot_mapping: Tensor
    ) -> paged.PagedBatch:
        return paged.PagedBatch(
            metadata.num_tokens,
            metadata.min_query_len,
            metadata.max_query_len,
            metadata.query_start_loc,
            metadata.seq_lens,
            blk_table,
            slot_mapping,
            self.workspace.reserve(blk_table, self.block_size, metadata.max_query_len),
        )


class MinitronAttentionImpl(AttentionImpl[paged.PagedBatch]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError(f"{BACKEND} has no ALiBi")
        if logits_soft_cap:
            raise NotImplementedError(f"{BACKEND} has no soft cap of logits")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{BACKEND} has decoder attention only, not {attn_type}")
        if kv_cache_dtype not in MinitronAttentionBackend.supported_kv_cache_dtypes:
            raise NotImplementedError(f"{BACKEND} has no cache of {kv_cache_dtype}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: paged.PagedBatch,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """output [T, Hq, D], whose rows past the batch's are left as they are."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{BACKEND} does not quantise its output")
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        paged.attend(query, kv_cache, attn_metadata, self.scale, self.sliding_window, output)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        paged.append(key, value, kv_cache, slot_mapping)
