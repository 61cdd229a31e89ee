// Which of the compiled instruction sets runs: the best that the CPU has, or a lesser one for tests.

#pragma once

#include <string>
#include <vector>

#include "token_logprob.h"

namespace conspo {

std::vector<std::string> instruction_sets();  // that this CPU has, the best last
std::string instruction_set();                // the one that runs
void set_instruction_set(const std::string& name);
const RowKernels& row_kernels(Element element);

}  // namespace conspo
