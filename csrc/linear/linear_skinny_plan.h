// The plan of linear_skinny_sm90.cuh, and the part of its argument that the product gives.
#pragma once

#include "launch/op.h"
#include "linear/linear_skinny_tiles.h"

namespace mk {

mk_plan plan_skinny_sm90(int32_t dtype, const Product& a, const mk_device& device);

mk_status skinny_sm90_args(const Product& a, int32_t dtype, const mk_device& device,
                           SkinnySm90Ring* ring, TensorMap* x_map, TensorMap* w_map);

}  // namespace mk
