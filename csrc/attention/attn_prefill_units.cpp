#include <algorithm>

#include "attention/attn_prefill_plan.h"

namespace mk {

int32_t attn_blocks(int64_t num_items, const mk_device& device) {
    const int64_t clusters =
        std::clamp(device.num_sms / kAttnPrefillCluster, 1, kAttnPrefillMaxClusters);
    return static_cast<int32_t>(kAttnPrefillCluster * std::min(num_items, clusters));
}

}  // namespace mk
