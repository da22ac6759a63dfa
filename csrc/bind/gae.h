#pragma once
#include "scan.h"

namespace pf::bind {

inline void bind_gae(py::module_& m) {
  m.def("gae", [](py::handle rewards, py::handle values, py::handle last_values, py::handle terminated,
                  py::handle truncated, py::handle final_values, py::handle mask, py::handle mask_mode,
                  py::handle cu_seqlens, py::handle gamma, py::handle lam, int time_dim, bool is_double,
                  py::handle advantages, py::handle returns, py::handle moments, Resources resources) {
    const Op op("gae");
    ScanInputs scan(op, rewards, time_dim, cu_seqlens, is_double);
    scan.args.values = scan.stream("values", values);
    scan.episode_ends(last_values, terminated, truncated, final_values);
    scan.mask(mask, mask_mode);
    scan.args.gamma = scan.rate("gamma", gamma);
    scan.args.lam = scan.rate("lam", lam);
    scan.output(0, "advantages", advantages);
    scan.output(1, "returns", returns);
    scan.moments(moments);
    scan.run(resources, &pf::gae);
  });
}

}  // namespace pf::bind
