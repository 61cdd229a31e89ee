// conspo_kernels._C: the native kernels as bare functions. Schema, fake and autograd are those of conspo_kernels/ops.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu/instruction_set.h"
#include "cpu/ops.h"

PYBIND11_MODULE(_C, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.attr("torch_version") = TORCH_VERSION;  // whose binary interface this is built for
  m.def("token_logprob_forward", &conspo::token_logprob_forward, unlocked);
  m.def("token_logprob_backward", &conspo::token_logprob_backward, unlocked);
  m.def("token_logprob_forward_backward", &conspo::token_logprob_forward_backward, unlocked);
  m.def("sequence_score_forward", &conspo::sequence_score_forward, unlocked);
  m.def("sequence_score_backward", &conspo::sequence_score_backward, unlocked);
  m.def("group_infonce_forward", &conspo::group_infonce_forward, unlocked);
  m.def("exp", &conspo::exp, unlocked);
  m.def("instruction_sets", &conspo::instruction_sets);
  m.def("instruction_set", &conspo::instruction_set);
  m.def("set_instruction_set", &conspo::set_instruction_set);
}
