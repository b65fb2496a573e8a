"""Classes of the tensors that vLLM's modules hold and do not declare; an attribute missing here is refused, by name."""

from __future__ import annotations

CLASSES = {
    "*.kv_cache": "runtime",  # users' data: empty at load, bound to 256 MiB a layer at start-up (hazard H65)
    "kv_cache": "runtime",
    "*.cos_sin_cache": "derived",  # rotary tables, made by construction
    "*._[kvq]_scale_cpu": "derived",  # host copies of scales, at their defaults before the post-load steps
    "*._prob_scale_cpu": "derived",
    "*.expert_mask": "derived",  # which experts are local, made by construction
    "*.logical_to_physical_map": "runtime",
    "*.logical_replica_count": "runtime",
    "*.expert_load_view": "runtime",
}
