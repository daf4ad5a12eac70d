// The only file that knows torch and the CUDA kernels: unpacks tensors, checks what the kernels take for granted,
// registers the operators.
//
// It uses torch's stable ABI, so that one build serves every torch from 2.11 on, and can be made with a CPU build of it.
// The library loads where there is no GPU, and no CUDA. The schemas are in baft_kernels/backends/cuda.py.
#include <cstdint>
#include <optional>

#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/launches.h"

namespace {

using baft::cuda::Dtype;
using baft::cuda::Gate;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "expected bfloat16 or float16");
  return x.scalar_type() == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

template <class Value>
Value* pointer_to(const Tensor& x, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == count,
                  "expected a contiguous tensor of the right dtype and size");
  return static_cast<Value*>(x.mutable_data_ptr());
}

template <class Value>
Value* pointer_to(const std::optional<Tensor>& x, ScalarType type, int64_t count) {
  return x ? pointer_to<Value>(*x, type, count) : nullptr;
}

// Words of packed parameters: a quarter of the numbers' rows for each of 32 lanes and every 16 columns.
uint32_t* words_of(const std::optional<Tensor>& x, int64_t sets, int64_t rows, int64_t width) {
  return pointer_to<uint32_t>(x, ScalarType::Int, sets * width * rows / 2);
}

void check_matrix(const Tensor& x, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == width && x.stride(1) == 1,
                  "expected a matrix of shape [T, d], rows without gaps");
  STD_TORCH_CHECK(x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  "expected rows that begin at multiples of 16 bytes");
}

// torch's current stream of a device. CPU builds of torch have no such function, so it is looked up at the first call.
void* stream_of(const Tensor& x) {
  using CurrentStream = int32_t (*)(int32_t, void**);
  static const auto current_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(current_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream(x.get_device_index(), &stream) == 0, "torch has no current stream for this device");
  return stream;
}

void check_launch(const char* problem) { STD_TORCH_CHECK(problem == nullptr, "the CUDA kernel wasn't launched: ", problem); }

baft::cuda::Rows rows_of(const std::optional<Tensor>& list, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& adapters, int64_t total) {
  STD_TORCH_CHECK(!list || !adapters, "expected a mask beside adapters, not a list of rows");
  const int64_t sequences = adapters ? adapters->numel() : 1, items = list ? list->numel() : total;
  STD_TORCH_CHECK(sequences > 0 ? items % sequences == 0 : items == 0, "expected sequences of equal length");
  return {list ? pointer_to<const int64_t>(*list, ScalarType::Long, items) : nullptr,
          mask ? pointer_to<const uint8_t>(*mask, ScalarType::Bool, total) : nullptr,
          adapters ? pointer_to<const int64_t>(*adapters, ScalarType::Long, sequences) : nullptr,
          sequences, sequences > 0 ? items / sequences : 0};
}

void forward(const Tensor& h, const Tensor& out, const Tensor& weights, const Tensor& update,
             const std::optional<Tensor>& list, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& adapters, const Tensor& projection, const Tensor& basis, const Tensor& bias,
             int64_t gate) {
  const int64_t total = h.size(0), width = h.size(1), rank = update.size(1), sets = bias.size(0);
  const int64_t padded = baft::cuda::padded_rank(rank);
  check_matrix(h, total, width);
  check_matrix(out, total, width);
  STD_TORCH_CHECK(h.scalar_type() == out.scalar_type(), "expected h and out of one dtype");
  baft::cuda::Forward call{};
  call.h = h.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.h_stride = h.stride(0);
  call.out_stride = out.stride(0);
  call.rows = rows_of(list, mask, adapters, total);
  call.rank = static_cast<int>(rank);
  call.gate = static_cast<Gate>(gate);
  call.projection = words_of(projection, sets, 2 * padded, width);
  call.basis = words_of(basis, sets, padded, width);
  call.bias = pointer_to<float>(bias, ScalarType::Float, sets * 2 * rank);
  call.weights = pointer_to<float>(weights, ScalarType::Float, total * rank);
  call.update = pointer_to<float>(update, ScalarType::Float, total * rank);
  check_launch(baft::cuda::launch_forward(call, width, dtype_of(h), stream_of(h)));
}

void pack(const Tensor& basis, const Tensor& source, const Tensor& source_bias, const std::optional<Tensor>& gate,
          const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& forward_projection,
          const std::optional<Tensor>& forward_basis, const std::optional<Tensor>& backward_basis,
          const std::optional<Tensor>& backward_projection, const Tensor& bias, bool half) {
  STD_TORCH_CHECK(basis.dim() == 3, "expected parameter sets [N, r, d]");
  const int64_t sets = basis.size(0), rank = basis.size(1), width = basis.size(2), count = sets * rank * width;
  baft::cuda::Pack layer{};
  layer.basis = pointer_to<float>(basis, ScalarType::Float, count);
  layer.source = pointer_to<float>(source, ScalarType::Float, count);
  layer.source_bias = pointer_to<float>(source_bias, ScalarType::Float, sets * rank);
  layer.gate = pointer_to<float>(gate, ScalarType::Float, count);
  layer.gate_bias = pointer_to<float>(gate_bias, ScalarType::Float, sets * rank);
  layer.sets = sets;
  layer.rank = rank;
  layer.width = width;
  layer.padded_rank = baft::cuda::padded_rank(rank);
  layer.forward_projection = words_of(forward_projection, sets, 2 * layer.padded_rank, width);
  layer.forward_basis = words_of(forward_basis, sets, layer.padded_rank, width);
  layer.backward_basis = words_of(backward_basis, sets, layer.padded_rank, width);
  layer.backward_projection = words_of(backward_projection, sets, 2 * layer.padded_rank, width);
  layer.bias = pointer_to<float>(bias, ScalarType::Float, sets * 2 * rank);
  check_launch(baft::cuda::launch_pack(&layer, 1, half ? Dtype::float16 : Dtype::bfloat16, stream_of(basis)));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(baft_kernels, CUDA, library) {
  library.impl("cuda_forward", TORCH_BOX(&forward));
  library.impl("cuda_pack", TORCH_BOX(&pack));
}

static PyObject* padded_rank(PyObject*, PyObject* rank) {
  return PyLong_FromLong(baft::cuda::padded_rank(PyLong_AsLong(rank)));
}

static PyObject* has_forward(PyObject*, PyObject* arguments) {
  long width, rank;
  if (!PyArg_ParseTuple(arguments, "ll", &width, &rank)) return nullptr;
  return PyBool_FromLong(baft::cuda::has_forward(width, rank));
}

static PyMethodDef methods[] = {
    {"padded_rank", padded_rank, METH_O, "The rank that kernels for this one are compiled for, 0 for none."},
    {"has_forward", has_forward, METH_VARARGS, "Whether forward kernels are compiled for a width and a rank."},
    {}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddIntConstant(made, "INTERFACE", 1); // see cpu_bindings.cpp
  return made;
}
