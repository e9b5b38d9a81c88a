// intrinsics.cuh under the shim.

#include "intrinsics.cuh"

#include "harness.h"

int main(int argc, char** argv) {
  const harness::Arguments in(argc, argv);
  const auto& words = in.tensor("words");
  dev::launch(unsigned(words.size(0)), 32, 1024, intrinsics::run, int(in.integer("op")),
              words.data<const uint32_t>(), in.tensor("results").data<uint32_t>());
}
