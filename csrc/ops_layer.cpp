// The operators that form the gradients of a linear layer's weight, on the CPU: as rows of G, and as columns of a G
// that is projected on and never whole.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "layers.h"
#include "projection.h"

namespace gem_fast {
namespace {

void layer_gradient_cpu(const Tensor& out, const Tensor& delta, const std::optional<Tensor>& x, const Tensors& entries,
                        const std::optional<Tensor>& positions, const std::vector<int64_t>& sizes) {
  check(out.scalar_type() == delta.scalar_type() && out.dim() == 3 &&
            out.size(0) == static_cast<int64_t>(sizes.size()) && out.stride(2) == 1 && out.stride(1) == out.size(2),
        "out must have shape (t, outputs, inputs) with contiguous tasks and delta's dtype, got ", shape_of(out));
  const LayerCall call(delta, out.size(1), out.size(2), x, entries, positions, sizes);
  cpu::write_rows(call.gradients, {out.mutable_data_ptr(), out.stride(0)}, kTorchThreads);
}

ProjectResult project_layer_cpu(const Tensors& grads, const Tensor& G, const Tensor& grad, const Tensor& delta,
                                const std::optional<Tensor>& x, const Tensors& entries,
                                const std::optional<Tensor>& positions, const std::vector<int64_t>& sizes,
                                double margin, double ridge) {
  const auto t = static_cast<int64_t>(sizes.size());
  check(grad.dim() == 2 && grad.scalar_type() == delta.scalar_type(),
        "grad must have shape (outputs, inputs) and delta's dtype, got ", shape_of(grad));
  check_writable({grad}, "grad");
  check(G.dim() == 2 && G.size(0) == t && G.scalar_type() == grad.scalar_type(),
        "G must have shape (t, p) with t = ", t, " and grad's dtype, got ", shape_of(G));
  const LayerCall call(delta, grad.size(0), grad.size(1), x, entries, positions, sizes);
  const Tensor dense = as_contiguous(grad);
  const cpu::LayerColumns layer{call.gradients, dense.mutable_data_ptr()};
  ProjectResult result = project_grads(grads, G, &layer, margin, ridge);
  if (!grad.is_contiguous()) {
    Tensor target = grad;
    torch::stable::copy_(target, dense);
  }
  return result;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_FRAGMENT(gem_fast, m) {
  m.def(
      "_layer_gradient_(Tensor(a!) out, Tensor delta, Tensor? x, Tensor[] entries, Tensor? positions, int[] sizes) "
      "-> ()");
  m.def(
      "_project_layer_(Tensor(a!)[] grads, Tensor G, Tensor(b!) grad, Tensor delta, Tensor? x, Tensor[] entries, "
      "Tensor? positions, int[] sizes, float margin, float ridge) -> "
      "(Tensor v, Tensor q, Tensor status, Tensor residual)");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_layer_gradient_", TORCH_BOX(&gem_fast::layer_gradient_cpu));
  m.impl("_project_layer_", TORCH_BOX(&gem_fast::project_layer_cpu));
}
