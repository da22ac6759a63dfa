#pragma once
#include "scan.h"

namespace pf::bind {

inline void bind_vtrace(py::module_& m) {
  m.def("vtrace", [](py::handle log_rhos, py::handle rewards, py::handle values, py::handle last_values,
                     py::handle terminated, py::handle truncated, py::handle final_values, py::handle mask,
                     py::handle gamma, py::handle lam, py::handle rho_clip, py::handle c_clip, int time_dim,
                     bool is_double, py::handle targets, py::handle advantages, Resources resources) {
    const Op op("vtrace");
    ScanInputs scan(op, rewards, time_dim, py::none(), is_double);
    scan.args.log_rhos = scan.stream("log_rhos", log_rhos);
    scan.args.values = scan.stream("values", values);
    scan.episode_ends(last_values, terminated, truncated, final_values);
    scan.mask(mask, {});
    scan.args.gamma = scan.rate("gamma", gamma);
    scan.args.lam = scan.rate("lam", lam);
    scan.args.rho_clip = scan.clip("rho_clip", rho_clip);
    scan.args.c_clip = scan.clip("c_clip", c_clip);
    scan.output(0, "targets", targets);
    scan.output(1, "advantages", advantages);
    scan.run(resources, &pf::vtrace);
  });
}

}  // namespace pf::bind
