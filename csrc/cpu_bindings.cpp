// The only file that knows torch: unpacks tensors, checks what the kernels take for granted, registers the operators.
//
// It uses torch's stable ABI, so that one build serves every torch from 2.11 on. The schemas are in
// baft_kernels/backends/cpu.py.
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cpu/op.h"

namespace {

using baft::cpu::Dtype;
using baft::cpu::Gate;
using baft::cpu::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

Matrix matrix_of(const Tensor& x, int64_t rows, int64_t d) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == d, "expected a matrix of shape [T, d]");
  STD_TORCH_CHECK(d == 1 || x.stride(1) == 1, "expected rows without gaps");
  return {x.mutable_data_ptr(), x.stride(0), dtype_of(x)};
}

float* floats_of(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                  "expected contiguous float32 of the right size");
  return static_cast<float*>(x.mutable_data_ptr());
}

float* floats_of(const std::optional<Tensor>& x, int64_t count) { return x ? floats_of(*x, count) : nullptr; }

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Panels or blocks of `units` columns or rows times `inner`, which pairs pad to an even number; see cpu/kernels.h.
baft::cpu::Packed packed_of(const Tensor& x, Dtype of_matrix, int64_t units, int64_t inner) {
  const bool pairs = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!pairs || (baft::cpu::kernels().pairs && of_matrix == Dtype::bfloat16),
                  "expected float32 parameters");
  STD_TORCH_CHECK((pairs || x.scalar_type() == ScalarType::Float) && x.is_contiguous() &&
                      x.numel() == units * (pairs ? padded(inner, 2) : inner),
                  "expected packed parameters of the right size");
  return {x.mutable_data_ptr(), pairs};
}

baft::cpu::Rows rows_of(const std::optional<Tensor>& rows, int64_t all) {
  if (!rows) return {nullptr, all};
  STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Long && rows->dim() == 1 && rows->is_contiguous(),
                  "expected contiguous int64 row numbers");
  return {static_cast<const int64_t*>(rows->const_data_ptr()), rows->numel()};
}

int64_t outputs_of(Gate gate, int64_t r) { return gate == Gate::none ? r : 2 * r; }

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// The call on `count` rows of h in all; its parameters are those of one set of `sets`.
baft::cpu::Forward forward_of(const Tensor& h, const Tensor& out, const Tensor& weights, const Tensor& update,
                              const std::optional<Tensor>& rows, const Tensor& projection, const Tensor& basis,
                              const Tensor& bias, Gate gate, int64_t sets) {
  const int64_t count = h.size(0), d = h.size(1), r = weights.size(1);
  baft::cpu::Forward call{};
  call.h = matrix_of(h, count, d);
  call.out = matrix_of(out, count, d);
  STD_TORCH_CHECK(call.h.dtype == call.out.dtype, "expected h and out of one dtype");
  call.rows = rows_of(rows, count);
  call.d = d;
  call.r = r;
  call.gate = gate;
  call.projection = packed_of(projection, call.h.dtype, sets * padded(outputs_of(gate, r), baft::cpu::kPanel), d);
  call.basis = packed_of(basis, call.h.dtype, sets * padded(d, baft::cpu::kBlock), r);
  call.bias = floats_of(bias, sets * outputs_of(gate, r));
  call.weights = floats_of(weights, count * r);
  call.update = floats_of(update, count * r);
  return call;
}

void forward_out(const Tensor& h, const Tensor& out, const Tensor& weights, const Tensor& update,
                 const std::optional<Tensor>& rows, const Tensor& projection, const Tensor& basis, const Tensor& bias,
                 int64_t gate_number) {
  const Gate gate = static_cast<Gate>(gate_number);
  baft::cpu::forward(forward_of(h, out, weights, update, rows, projection, basis, bias, gate, 1), parallel_for);
}

// Of rows that are sorted by parameter set, those from first[i] to first[i + 1] by set number[i].
void grouped_forward_out(const Tensor& h, const Tensor& out, const Tensor& weights, const Tensor& update,
                         const Tensor& rows, const Tensor& number, const Tensor& first, const Tensor& projection,
                         const Tensor& basis, const Tensor& bias, int64_t gate_number) {
  const Gate gate = static_cast<Gate>(gate_number);
  const int64_t all = bias.size(0);
  const auto call = forward_of(h, out, weights, update, rows, projection, basis, bias, gate, all);
  baft::cpu::Sets sets{};
  sets.count = number.numel();
  sets.number = rows_of(number, 0).rows;
  sets.first = rows_of(first, 0).rows;
  STD_TORCH_CHECK(first.numel() == sets.count + 1 && sets.first[0] == 0 && sets.first[sets.count] == call.rows.count,
                  "expected the bounds of each set's rows");
  for (int64_t i = 0; i < sets.count; ++i)
    STD_TORCH_CHECK(sets.number[i] >= 0 && sets.number[i] < all && sets.first[i] <= sets.first[i + 1],
                    "expected numbers of parameter sets, and rows in their order");
  if (all == 0) return;
  sets.projection_bytes = projection.numel() / all * projection.element_size();
  sets.basis_bytes = basis.numel() / all * basis.element_size();
  sets.bias_floats = bias.numel() / all;
  baft::cpu::grouped_forward(call, sets, parallel_for);
}

// Large memory comes fresh from the system, which hands it over page by page as it is written: at 4 KiB a page that
// takes longer than the writing. Where the system leaves the choice to programs, ask for pages of 2 MiB.
void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (end >= first + kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A contiguous matrix on the CPU; torch::stable::new_empty goes through the dispatcher, and takes several times longer.
Tensor new_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor matrix(handle);
  ask_for_huge_pages(matrix.mutable_data_ptr(), rows * columns * matrix.element_size());
  return matrix;
}

Tensor new_like(const Tensor& h) { return new_matrix(h.size(0), h.size(1), h.scalar_type()); }

// All rows, into new tensors: three allocations and a call from Python would take longer than the work on one row.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& h, const Tensor& projection, const Tensor& basis,
                                           const Tensor& bias, int64_t gate_number) {
  const int64_t count = h.size(0);
  const int64_t r = static_cast<Gate>(gate_number) == Gate::none ? bias.numel() : bias.numel() / 2;
  const Tensor out = new_like(h);
  const Tensor weights = new_matrix(count, r, ScalarType::Float), update = new_matrix(count, r, ScalarType::Float);
  forward_out(h, out, weights, update, std::nullopt, projection, basis, bias, gate_number);
  return {out, weights, update};
}

void backward(const Tensor& grad_out, const std::optional<Tensor>& grad_weights,
              const std::optional<Tensor>& grad_update, const Tensor& h, const Tensor& weights, const Tensor& update,
              const std::optional<Tensor>& rows, const Tensor& basis, const Tensor& projection, int64_t gate_number,
              const std::optional<Tensor>& grad_h, const std::optional<Tensor>& basis_gradient,
              const std::optional<Tensor>& source_gradient, const std::optional<Tensor>& source_bias_gradient,
              const std::optional<Tensor>& gate_gradient, const std::optional<Tensor>& gate_bias_gradient) {
  const int64_t count = h.size(0), d = h.size(1), r = weights.size(1);
  const Gate gate = static_cast<Gate>(gate_number);
  baft::cpu::Backward call{};
  call.grad_out = matrix_of(grad_out, count, d);
  call.h = matrix_of(h, count, d);
  if (grad_h) call.grad_h = matrix_of(*grad_h, count, d);
  STD_TORCH_CHECK(!grad_h || call.grad_h.dtype == call.grad_out.dtype, "expected gradients of one dtype");
  call.rows = rows_of(rows, count);
  call.d = d;
  call.r = r;
  call.gate = gate;
  call.basis = packed_of(basis, call.h.dtype, padded(r, baft::cpu::kPanel), d);
  call.projection = packed_of(projection, call.h.dtype, padded(d, baft::cpu::kBlock), outputs_of(gate, r));
  STD_TORCH_CHECK(!call.basis.pairs || outputs_of(gate, r) <= baft::cpu::kMostPairs, "expected fewer bases for pairs");
  call.weights = floats_of(weights, count * r);
  call.update = floats_of(update, count * r);
  call.grad_weights = floats_of(grad_weights, count * r);
  call.grad_update = floats_of(grad_update, count * r);
  call.basis_gradient = floats_of(basis_gradient, r * d);
  call.source_gradient = floats_of(source_gradient, r * d);
  call.source_bias_gradient = floats_of(source_bias_gradient, r);
  call.gate_gradient = floats_of(gate_gradient, r * d);
  call.gate_bias_gradient = floats_of(gate_bias_gradient, r);
  baft::cpu::backward(call, parallel_for);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(baft_kernels, CPU, library) {
  library.impl("cpu_forward", TORCH_BOX(&forward));
  library.impl("cpu_forward_out", TORCH_BOX(&forward_out));
  library.impl("cpu_grouped_forward_out", TORCH_BOX(&grouped_forward_out));
  library.impl("cpu_backward", TORCH_BOX(&backward));
  library.impl("cpu_empty_like", TORCH_BOX(&new_like));
}

// -- a Python module, so that setuptools builds it and finds it; importing it registers the operators --

static PyObject* variant(PyObject*, PyObject*) { return PyUnicode_FromString(baft::cpu::kernels().name); }

static PyObject* pairs(PyObject*, PyObject*) { return PyBool_FromLong(baft::cpu::kernels().pairs); }

static PyMethodDef methods[] = {
    {"variant", variant, METH_NOARGS, "The instruction set whose kernels run on this processor."},
    {"pairs", pairs, METH_NOARGS, "Whether they take parameters in pairs of bfloat16."},
    {}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* made = PyModule_Create(&module);
  // baft_kernels/backends/cpu.py asks for this number: a library left over from another version must not be called.
  if (made) PyModule_AddIntConstant(made, "INTERFACE", 3);
  return made;
}
