#pragma once
#include "scan.h"

namespace pf::bind {

inline void bind_discounted_returns(py::module_& m) {
  m.def("discounted_returns", [](py::handle rewards, py::handle last_values, py::handle terminated,
                                 py::handle truncated, py::handle final_values, py::handle mask, py::handle gamma,
                                 int time_dim, bool is_double, py::handle returns, Resources resources) {
    const Op op("discounted_returns");
    ScanInputs scan(op, rewards, time_dim, py::none(), is_double);
    scan.episode_ends(last_values, terminated, truncated, final_values);
    scan.mask(mask, {});
    scan.args.gamma = scan.rate("gamma", gamma);
    scan.output(0, "returns", returns);
    scan.run(resources, &pf::discounted_returns);
  });
}

}  // namespace pf::bind
