// The kernels of the conv stem, for tests that read what the compiler made of them.

#include "conv_stem_plan.h"

namespace conv_stem {
template __global__ void conv_stem_forward<dev::Bf16, true>(ForwardPlan);
template __global__ void conv_stem_forward<dev::Bf16, false>(ForwardPlan);
template __global__ void conv_stem_forward<dev::Fp16, true>(ForwardPlan);
template __global__ void conv_stem_forward<dev::Fp16, false>(ForwardPlan);
template __global__ void conv_stem_dweight<dev::Bf16>(BackwardPlan);
template __global__ void conv_stem_dweight<dev::Fp16>(BackwardPlan);
}  // namespace conv_stem
