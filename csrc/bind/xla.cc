// The extension module ppo_fast._C_xla: every call of _C as a plan, checked when a program is traced, and the handlers
// that run plans inside XLA's programs, on the CPU and on NVIDIA GPUs, with the kernels of _C and _C_cuda.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <memory>

#include "kernels.h"
#include "ops.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
namespace py = pybind11;
using pf::bind::Given;
using pf::bind::Kernel;
using pf::bind::kPlanHead;

const Kernel* cpu_kernels = nullptr;
const Kernel* cuda_kernels = nullptr;

constexpr size_t kLargest = [] {
  size_t largest = 0;
#define X(op, Args) largest = sizeof(pf::Args) > largest ? sizeof(pf::Args) : largest;
  PF_OPS(X)
#undef X
  return largest;
}();

// Runs a plan with the buffers of this call: arguments first, then results.
ffi::Error run_plan(const Kernel* kernels, Given& given, ffi::RemainingArgs& args, ffi::RemainingRets& rets,
                    ffi::Span<const int64_t> plan) {
  const int64_t* p = plan.begin();
  const int64_t n = static_cast<int64_t>(plan.size());
  if (n < kPlanHead || p[0] < 0 || p[0] >= pf::kOpCount || n != kPlanHead + p[1] + 2 * p[2] + p[3] ||
      p[1] * static_cast<int64_t>(sizeof(int64_t)) != kernels[p[0]].size) {
    return ffi::Error::InvalidArgument(
        "ppo_fast: this program was traced with another build of ppo_fast; trace it again");
  }
  alignas(64) unsigned char memory[kLargest];
  const int64_t *pointers = p + kPlanHead, *words = pointers + 2 * p[2], *appended = words + p[1];
  std::memcpy(memory, words, p[1] * sizeof(int64_t));
  static constexpr char kNothing[8] = {};
  for (int64_t i = 0; i < p[2]; ++i) {
    const int64_t word = pointers[2 * i], buffer = pointers[2 * i + 1], n_args = static_cast<int64_t>(args.size());
    const void* data = nullptr;
    if (word >= 0 && word < p[1] && buffer < n_args + static_cast<int64_t>(rets.size())) {
      if (buffer < n_args) {
        data = args.get<ffi::AnyBuffer>(buffer)->untyped_data();
      } else {
        data = (*rets.get<ffi::AnyBuffer>(buffer - n_args))->untyped_data();
      }
    } else {
      return ffi::Error::InvalidArgument("ppo_fast: a plan for other buffers than those of the call");
    }
    if (!data) data = kNothing;  // nothing in it, but there
    std::memcpy(memory + word * sizeof(int64_t), &data, sizeof(data));
  }
  given.appended = appended;
  kernels[p[0]].run(memory, given);
  return given.error.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(given.error);
}

// Blocks of work on XLA's own threads. The caller works too and waits only for blocks that somebody has begun, so it
// matters not whether a helper ever finds the time.
struct Job {
  std::atomic<int64_t> next{0}, done{0};
  int64_t blocks;
  void (*work)(void*, int64_t);
  void* of_work;
  void help() {
    for (int64_t b = next++; b < blocks; b = next++) {
      work(of_work, b);
      if (++done == blocks) done.notify_all();
    }
  }
};

void on_threads_of_xla(void* context, int threads, int64_t blocks, void (*work)(void*, int64_t), void* of_work) {
  auto& pool = *static_cast<ffi::ThreadPool*>(context);
  const auto job = std::make_shared<Job>();
  job->blocks = blocks, job->work = work, job->of_work = of_work;
  const int64_t helpers = std::min<int64_t>(threads, blocks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->help(); });
  job->help();
  for (int64_t done = job->done; done < blocks; done = job->done) job->done.wait(done);
}

// XLA maps fresh pages for a large result; two megabytes at a time they cost a tenth of what they cost one by one.
void ask_for_large_pages(const ffi::AnyBuffer& result) {
#ifdef __linux__
  constexpr size_t kPage = size_t{1} << 21;
  const size_t first = reinterpret_cast<size_t>(result.untyped_data()), end = first + result.size_bytes();
  const size_t from = (first + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
}

ffi::Error on_cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> plan) {
  Given given;
  given.threads = std::max<int>(1, static_cast<int>(pool.num_threads()));
  given.blocks = &on_threads_of_xla;
  given.context = &pool;
  for (size_t i = 0; i < rets.size(); ++i) ask_for_large_pages(**rets.get<ffi::AnyBuffer>(i));
  return run_plan(cpu_kernels, given, args, rets, plan);
}

ffi::Error on_cuda(void* stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Span<const int64_t> plan) {
  Given given;
  given.stream = stream;
  given.context = &scratch;
  given.memory = [](void* context, int64_t bytes) {
    return static_cast<ffi::ScratchAllocator*>(context)->Allocate(bytes, 256).value_or(nullptr);
  };
  return run_plan(cuda_kernels, given, args, rets, plan);
}

XLA_FFI_DEFINE_HANDLER(
    cpu_handler, on_cpu,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("plan"));
XLA_FFI_DEFINE_HANDLER(cuda_handler, on_cuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<ffi::Span<const int64_t>>("plan"));

}  // namespace

PYBIND11_MODULE(_C_xla, m) {
  using namespace pf::bind;
  m.doc() = "Calls of ppo_fast's kernels as plans, and the XLA handlers that run them.";
  py::class_<Buffer>(m, "Buffer", py::module_local())
      .def(py::init([](const py::sequence& shape, std::string dtype, int64_t index) {
    return Buffer{integers(shape), std::move(dtype), index};
  }),
           py::arg("shape"), py::arg("dtype"), py::arg("index"))
      .def_readonly("index", &Buffer::index);
  bind_ops(m);
  py::tuple names(static_cast<size_t>(pf::kOpCount));
  size_t i = 0;
#define X(op, Args) names[i++] = #op;
  PF_OPS(X)
#undef X
  m.attr("OPS") = names;
  m.attr("FFI") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);  // jaxlib's must not be older
  m.def("handler",
        [](const std::string& platform, const py::capsule& kernels) {
    const bool on_cpu = platform == "cpu";
    (on_cpu ? cpu_kernels : cuda_kernels) =
        static_cast<const Kernel*>(PyCapsule_GetPointer(kernels.ptr(), "ppo_fast.kernels"));
    return py::capsule(reinterpret_cast<void*>(on_cpu ? cpu_handler : cuda_handler));
  }, py::arg("platform"), py::arg("kernels"),
        "The handler of every op on \"cpu\" or \"CUDA\", and the kernels it is to run.");
}
