// What the operators run on a GPU. Every op: check, guard the device, allocate through torch, launch on torch's current
// stream. Nothing here waits for the device, so that all of it can be captured in a CUDA graph.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/pack.h"
#include "cuda/project.h"
#include "cuda/solve.h"

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
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
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

std::tuple<Tensor, Tensor> gram_cuda(const Tensor& G, const Tensors& grads) {
  check_devices(grads, G, "grads");
  const OnDeviceOf device(G);
  const MatrixView matrix(G);
  const ListView list(grads, "grads", G);
  Tensor P = new_doubles(G, {matrix.rows.t, matrix.rows.t});
  Tensor q = new_doubles(G, {matrix.rows.t});
  const Tensor workspace = new_doubles(G, {cuda::gram_workspace(matrix.rows, list.segments())});
  cuda::gram(matrix.rows, list.segments(), doubles(P), doubles(q), doubles(workspace), device.stream);
  return {P, q};
}

std::tuple<Tensor, Tensor, Tensor> nnqp_cuda(const Tensor& P, const Tensor& q, double lower, double ridge) {
  check_device(P, q, "P");
  check_device(q, P, "q");
  const OnDeviceOf device(q);
  const NnqpCall call(P, q, lower, ridge);
  const Tensor workspace = new_doubles(q, {cuda::nnqp_workspace(call.batch.count, call.batch.t)});
  cuda::nnqp(call.batch, doubles(call.v), call.statuses(), doubles(call.residual), doubles(workspace), device.stream);
  return {call.v, call.status, call.residual};
}

void combine_cuda(const Tensors& grads, const Tensor& G, const Tensor& v) {
  check_devices(grads, G, "grads");
  check_device(v, G, "v");
  const OnDeviceOf device(G);
  const MatrixView matrix(G);
  check_writable(grads, "grads");
  const ListView list(grads, "grads", G);
  const Tensor weights = check_weights(v, G);
  cuda::combine(list.segments(), matrix.rows, doubles(weights), device.stream);
  list.write_back(grads);
}

void pack_cuda(const Tensor& row, const std::vector<std::optional<Tensor>>& tensors,
               const std::vector<int64_t>& sizes) {
  check_device(row, row, "row");
  for (const auto& x : tensors) {
    if (x.has_value()) check_device(*x, row, "tensors");
  }
  const OnDeviceOf device(row);
  const PackCall call(row, tensors, sizes);
  cuda::pack(call.segments(), row.mutable_data_ptr(), call.dtype, device.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> project_cuda(const Tensors& grads, const Tensor& G, double margin,
                                                        double ridge) {
  check_devices(grads, G, "grads");
  const OnDeviceOf device(G);
  const MatrixView matrix(G);
  check_writable(grads, "grads");
  const ListView list(grads, "grads", G);
  check_not_negative(margin, "margin");
  check_not_negative(ridge, "ridge");
  Tensor v = new_doubles(G, {matrix.rows.t});
  Tensor q = new_doubles(G, {matrix.rows.t});
  Tensor status = new_int(G);
  Tensor residual = new_doubles(G, {});
  const Tensor workspace = new_doubles(G, {cuda::project_workspace(matrix.rows, list.segments())});
  cuda::project(list.segments(), matrix.rows, margin, ridge, doubles(v), doubles(q),
                static_cast<int32_t*>(status.mutable_data_ptr()), doubles(residual), doubles(workspace), device.stream);
  list.write_back(grads);
  return {v, q, status, residual};
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gem_fast::gram_cuda));
  m.impl("nnqp", TORCH_BOX(&gem_fast::nnqp_cuda));
  m.impl("combine_", TORCH_BOX(&gem_fast::combine_cuda));
  m.impl("pack_", TORCH_BOX(&gem_fast::pack_cuda));
  m.impl("project_", TORCH_BOX(&gem_fast::project_cuda));
}
