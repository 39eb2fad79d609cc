#include <algorithm>

#include "attention/attn_prefill_plan.h"

namespace mk {

AttnUnits attn_units(int32_t num_q_heads, int32_t num_kv_heads) {
    const bool pairs = num_q_heads / num_kv_heads % kAttnPrefillCluster == 0;
    return pairs ? AttnUnits{num_q_heads / kAttnPrefillCluster, kAttnPrefillTileM}
                 : AttnUnits{num_q_heads, kAttnPrefillTileM * kAttnPrefillCluster};
}

int32_t attn_blocks(int64_t num_items, const mk_device& device) {
    const int64_t clusters = std::max(device.num_sms / kAttnPrefillCluster, 1);
    return static_cast<int32_t>(kAttnPrefillCluster * std::min(num_items, clusters));
}

}  // namespace mk
