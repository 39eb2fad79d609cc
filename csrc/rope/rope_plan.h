// What the plans of ops with rotary position embedding share.
#pragma once

#include "launch/op.h"

namespace mk {

// Fields of rope, named "rope.<field>", for this many tokens. Tables or theta, as cos tells.
mk_status check_rope(const mk_rope& rope, int32_t tokens, int32_t head_dim);

}  // namespace mk
