// What the operators run on a GPU: on torch's current stream of the tensors' device, in memory from torch. Nothing here
// waits for the device, so that all of it can be captured in a CUDA graph.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/pack.h"
#include "cuda/project.h"
#include "cuda/solve.h"
#include "torch/checks.h"
#include "torch/views.h"

namespace gem_fast {
namespace {

// torch's stream, by a function that only CUDA builds of torch have: it is looked up in what the process has loaded, so
// that this file links against any torch.
cuda::Stream current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(torch_cuda != nullptr ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    check<std::runtime_error>(symbol != nullptr, "CUDA tensors need a CUDA build of torch, got one without ",
                              "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

// Makes the device of x the current one as long as it lives.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream;

  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
};

void check_device(const Tensor& x, const Tensor& like, const char* name) {
  check(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
        " must be on the GPU of the other tensors, got another device");
}

void check_devices(const Tensors& list, const Tensor& G, const char* name) {
  check_device(G, G, "G");
  for (const Tensor& x : list) check_device(x, G, name);
}

std::tuple<Tensor, Tensor> gram_cuda(const Tensor& G, const Tensors& grads, bool in_float64) {
  check_devices(grads, G, "grads");
  const OnDeviceOf device(G);
  const GramCall call(grads, G, in_float64);
  const Tensor workspace = new_doubles(G, {cuda::gram_workspace(call.matrix.rows, call.grads.list(), call.products)});
  const cuda::GramOutput out{doubles(call.P), doubles(call.q), doubles(call.g_squared)};
  cuda::gram(call.matrix.rows, call.grads.list(), call.products, nullptr, out, doubles(workspace), device.stream);
  return call.result();
}

std::tuple<Tensor, Tensor, Tensor> project_dual_cuda(const Tensor& P, const Tensor& q, const Tensor& g_squared,
                                                     const std::optional<Tensor>& cancellation, double margin,
                                                     double ridge, bool in_float64) {
  check_device(P, q, "P");
  check_device(q, P, "q");
  check_device(g_squared, P, "g_squared");
  if (cancellation.has_value()) check_device(*cancellation, P, "cancellation");
  const OnDeviceOf device(q);
  const DualCall call(P, q, g_squared, cancellation, margin, ridge, in_float64);
  const Tensor workspace = new_doubles(q, {cuda::nnqp_workspace(1, call.problem.dual.t)});
  cuda::project_dual({}, call.problem, cuda::When::kAlways, doubles(call.v), ints(call.status), doubles(call.residual),
                     doubles(workspace), device.stream);
  return call.result();
}

std::tuple<Tensor, Tensor, Tensor> nnqp_cuda(const Tensor& P, const Tensor& q, double lower, double ridge) {
  check_device(P, q, "P");
  check_device(q, P, "q");
  const OnDeviceOf device(q);
  const NnqpCall call(P, q, lower, ridge);
  const Tensor workspace = new_doubles(q, {cuda::nnqp_workspace(call.batch.count, call.batch.t)});
  cuda::nnqp(call.batch, doubles(call.v), ints(call.status), doubles(call.residual), doubles(workspace), device.stream);
  return {call.v, call.status, call.residual};
}

void combine_cuda(const Tensors& grads, const Tensor& G, const Tensor& v) {
  check_devices(grads, G, "grads");
  check_device(v, G, "v");
  const OnDeviceOf device(G);
  const CombineCall call(grads, G);
  const Tensor weights = check_weights(v, G);
  cuda::combine(call.grads.list(), call.matrix.rows, doubles(weights), device.stream);
  call.grads.write_back(grads);
}

void pack_cuda(const Tensor& row, const std::vector<std::optional<Tensor>>& tensors,
               const std::vector<int64_t>& sizes) {
  check_device(row, row, "row");
  for (const auto& x : tensors) {
    if (x.has_value()) check_device(*x, row, "tensors");
  }
  const OnDeviceOf device(row);
  const PackCall call(row, tensors, sizes);
  cuda::pack(call.list(), row.mutable_data_ptr(), call.dtype, device.stream);
}

ProjectResult project_cuda(const Tensors& grads, const Tensor& G, double margin, double ridge) {
  check_devices(grads, G, "grads");
  const OnDeviceOf device(G);
  const ProjectCall call(grads, G, margin, ridge);
  const RowMatrix& rows = call.matrix.rows;
  const TensorList g = call.grads.list();
  const Tensor workspace = new_doubles(G, {cuda::project_workspace(rows, g)});
  cuda::project(g, rows, margin, ridge, doubles(call.v), doubles(call.q), ints(call.status), doubles(call.residual),
                doubles(workspace), device.stream);
  call.grads.write_back(grads);
  return call.result();
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gem_fast::gram_cuda));
  m.impl("nnqp", TORCH_BOX(&gem_fast::nnqp_cuda));
  m.impl("combine_", TORCH_BOX(&gem_fast::combine_cuda));
  m.impl("pack_", TORCH_BOX(&gem_fast::pack_cuda));
  m.impl("_project_dual", TORCH_BOX(&gem_fast::project_dual_cuda));
  m.impl("project_", TORCH_BOX(&gem_fast::project_cuda));
}
