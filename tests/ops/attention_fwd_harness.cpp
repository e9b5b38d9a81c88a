// One forward call of attention, planned as on the device; "keys" and "multiprocessors" choose how.

#include "attention_fwd_plan.h"
#include "harness.h"

namespace {

attention::InputRows rows(const harness::Tensor& t) {
  return {t.data<const void>(), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace

int main(int argc, char** argv) {
  const harness::Arguments given(argc, argv);
  const auto &q = given.tensor("q"), &k = given.tensor("k"), &o = given.tensor("o");
  attention::Forward call{};
  attention::Inputs& in = call.in;
  in.q = rows(q), in.k = rows(k), in.v = rows(given.tensor("v"));
  call.o = {o.data<void>(), o.stride(0), o.stride(1), o.stride(2)};
  call.lse = given.tensor("lse").data<float>();
  in.key_mask = given.data_or_null<const uint8_t>("key_mask");
  if (in.key_mask) {
    in.mask_image = given.tensor("key_mask").stride(0);
    in.mask_key = given.tensor("key_mask").stride(1);
  }
  in.head_scale = given.data_or_null<const float>("head_scale");
  in.seed = given.data_or_null<const int64_t>("seed");
  in.threshold = uint32_t(given.integer("threshold"));
  in.keep_factor = float(given.number("keep_factor"));
  in.scale = float(given.number("scale"));
  in.type = q.dtype == "bfloat16"  ? attention::Type::Bf16
            : q.dtype == "float16" ? attention::Type::Fp16
                                   : attention::Type::Fp32;
  in.B = int(q.size(0)), in.H = int(q.size(1)), in.L = int(q.size(2)), in.D = int(q.size(3));
  in.S = int(k.size(2));
  const auto launch = attention::plan_forward(call, int(given.integer("multiprocessors")),
                                              int(given.integer("keys")));
  attention::with_forward_kernel(launch, [&](auto* kernel) {
    dev::launch(dim3(launch.grid_x, launch.grid_y), attention::kForwardWarps * 32,
                launch.shared_bytes, kernel, launch.plan);
  });
}
