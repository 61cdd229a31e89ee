#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

namespace conspo {
namespace {

struct InstructionSet {
  const char* name;
  const RowKernels* kernels;
};

std::vector<InstructionSet> detect() {
  std::vector<InstructionSet> found = {{"baseline", BASELINE_KERNELS}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back({"avx2", AVX2_KERNELS});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back({"avx512", AVX512_KERNELS});
  }
#endif
  return found;
}

const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = detect();
  return sets;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{&available().back()};
  return set;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : available()) names.emplace_back(set.name);
  return names;
}

std::string instruction_set() { return chosen().load()->name; }

void set_instruction_set(const std::string& name) {
  for (const auto& set : available()) {
    if (name == set.name) {
      chosen().store(&set);
      return;
    }
  }
  throw std::invalid_argument("this CPU does not have the instruction set " + name);
}

const RowKernels& row_kernels(Element element) { return chosen().load()->kernels[element]; }

}  // namespace conspo
