// Which vectors the kernels use, chosen at run time.

#pragma once

#include <cstdlib>
#include <string>

enum class InstructionSet { Portable, Avx2, Avx512 };

// The widest that this processor has and ATEN_CPU_CAPABILITY allows ("default", "avx2"), the switch
// that PyTorch's own CPU kernels obey.
inline InstructionSet instruction_set() {
#ifdef __x86_64__
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = wish == nullptr ? "" : wish;
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && most != "avx2" && most != "default") return InstructionSet::Avx512;
  if (has_avx2 && most != "default") return InstructionSet::Avx2;
#endif
  return InstructionSet::Portable;
}
