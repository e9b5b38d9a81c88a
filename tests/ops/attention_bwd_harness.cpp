// One backward call of attention, planned as on the device; "queries" and "multiprocessors" choose
// how.

#include "attention_bwd_plan.h"
#include "harness.h"

namespace {

template <class Rows>
Rows rows(const harness::Tensor& t) {
  return {t.data<std::remove_pointer_t<decltype(Rows::data)>>(), t.stride(0), t.stride(1),
          t.stride(2)};
}

}  // namespace

int main(int argc, char** argv) {
  const harness::Arguments given(argc, argv);
  const auto input = [&](const char* name) {
    return rows<attention::InputRows>(given.tensor(name));
  };
  const auto output = [&](const char* name) {
    return rows<attention::OutputRows>(given.tensor(name));
  };
  attention::Backward call{};
  attention::Inputs& in = call.in;
  in.q = input("q"), in.k = input("k"), in.v = input("v");
  call.o = input("o"), call.grad_o = input("grad_o");
  call.grad_q = output("grad_q"), call.grad_k = output("grad_k"), call.grad_v = output("grad_v");
  call.lse = given.tensor("lse").data<const float>();
  call.grad_head_scale = given.data_or_null<float>("grad_head_scale");
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
  const auto &q = given.tensor("q"), &k = given.tensor("k");
  in.type = q.dtype == "bfloat16"  ? attention::Type::Bf16
            : q.dtype == "float16" ? attention::Type::Fp16
                                   : attention::Type::Fp32;
  in.B = int(q.size(0)), in.H = int(q.size(1)), in.L = int(q.size(2)), in.D = int(q.size(3));
  in.S = int(k.size(2));
  const auto launch = attention::bwd::plan_backward(call, int(given.integer("multiprocessors")),
                                                    int(given.integer("queries")));
  std::vector<float> sums(size_t(launch.sums / 4), NAN);
  attention::bwd::Plan plan = launch.plan;
  plan.call.sums = sums.data();
  attention::bwd::with_kernel(in, [&](auto, auto* kernel) {
    dev::launch(launch.grid, attention::bwd::kThreads, launch.shared_bytes, kernel, plan);
  });
}
