// The only file that knows torch and the CUDA kernels: unpacks tensors, checks what the kernels take for granted,
// registers the operators.
//
// It uses torch's stable ABI, so that one build serves every torch from 2.11 on, and can be made with a CPU build of
// it. The library loads where there is no GPU, and no CUDA. The schemas are in baft_kernels/backends/cuda.py.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/launches.h"

namespace {

using baft::cuda::Dtype;
using baft::cuda::Gate;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Float: return Dtype::float32;
    default: STD_TORCH_CHECK(false, "expected bfloat16, float16 or float32");
  }
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

using OptionalTensors = std::vector<std::optional<Tensor>>;

// Packed parameters: words of 32 bits.
uint32_t* words_of(const std::optional<Tensor>& x, int64_t sets, int64_t rows, int64_t width, Dtype dtype) {
  return pointer_to<uint32_t>(x, ScalarType::Int, sets * width * rows * bytes_of(dtype) / 4);
}

void check_matrix(const Tensor& x, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == width && x.stride(1) == 1,
                  "expected a matrix of shape [T, d], rows without gaps");
  STD_TORCH_CHECK(
      x.stride(0) * bytes_of(dtype_of(x)) % 16 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
      "expected rows that begin at multiples of 16 bytes");
}

#ifdef BAFT_EMULATED // for the tests, which link these bindings with the emulated GPU
#define BAFT_DEVICE_KEY CPU
void* stream_of(const Tensor&) { return nullptr; }
#else
#define BAFT_DEVICE_KEY CUDA
// torch's current stream of a device. CPU builds of torch have no such function, so it is looked up at the first call.
void* stream_of(const Tensor& x) {
  using CurrentStream = int32_t (*)(int32_t, void**);
  static const auto current_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")
                                                      : nullptr);
  }();
  STD_TORCH_CHECK(current_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream(x.get_device_index(), &stream) == 0, "torch has no current stream for this device");
  return stream;
}
#endif

void check_launch(const char* problem) {
  STD_TORCH_CHECK(problem == nullptr, "the CUDA kernel wasn't launched: ", problem);
}

baft::cuda::Rows rows_of(const std::optional<Tensor>& list, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& adapters, int64_t total) {
  STD_TORCH_CHECK(!list || !adapters, "expected a mask beside adapters, not a list of rows");
  const int64_t sequences = adapters ? adapters->numel() : 1, items = list ? list->numel() : total;
  STD_TORCH_CHECK(sequences > 0 ? items % sequences == 0 : items == 0, "expected sequences of equal length");
  return {list ? pointer_to<const int64_t>(*list, ScalarType::Long, items) : nullptr,
          mask ? pointer_to<const uint8_t>(*mask, ScalarType::Bool, total) : nullptr,
          adapters ? pointer_to<const int64_t>(*adapters, ScalarType::Long, sequences) : nullptr, sequences,
          sequences > 0 ? items / sequences : 0};
}

void forward(const Tensor& h, const Tensor& out, const Tensor& weights, const Tensor& update,
             const std::optional<Tensor>& list, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& adapters, const Tensor& projection, const Tensor& basis, const Tensor& bias,
             int64_t gate, bool settled) {
  const int64_t total = h.size(0), width = h.size(1), rank = update.size(1), sets = bias.size(0);
  const int64_t padded = baft::cuda::padded_rank(rank);
  const Dtype dtype = dtype_of(h);
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
  call.settled = settled;
  call.projection = words_of(projection, sets, 2 * padded, width, dtype);
  call.basis = words_of(basis, sets, padded, width, dtype);
  call.bias = pointer_to<float>(bias, ScalarType::Float, sets * 2 * rank);
  call.weights = pointer_to<float>(weights, ScalarType::Float, total * rank);
  call.update = pointer_to<float>(update, ScalarType::Float, total * rank);
  check_launch(baft::cuda::launch_forward(call, width, dtype, stream_of(h)));
}

void backward(const Tensor& grad_out, const std::optional<Tensor>& grad_weights,
              const std::optional<Tensor>& grad_update, const Tensor& h, const Tensor& weights, const Tensor& update,
              const std::optional<Tensor>& list, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& adapters, const Tensor& basis, const Tensor& projection, int64_t gate,
              const std::optional<Tensor>& grad_input, const std::optional<Tensor>& partial,
              const std::optional<Tensor>& partial_bias, const std::optional<Tensor>& slot_sets, int64_t sets) {
  const int64_t total = h.size(0), width = h.size(1), rank = update.size(1);
  const int64_t padded = baft::cuda::padded_rank(rank);
  const Dtype dtype = dtype_of(h);
  check_matrix(h, total, width);
  check_matrix(grad_out, total, width);
  STD_TORCH_CHECK(h.scalar_type() == grad_out.scalar_type(), "expected h and the gradient of out of one dtype");
  baft::cuda::Backward call{};
  call.grad_out = grad_out.const_data_ptr();
  call.h = h.const_data_ptr();
  call.grad_out_stride = grad_out.stride(0);
  call.h_stride = h.stride(0);
  if (grad_input) {
    check_matrix(*grad_input, total, width);
    STD_TORCH_CHECK(grad_input->scalar_type() == h.scalar_type(), "expected h and its gradient of one dtype");
    call.grad_input = grad_input->mutable_data_ptr();
    call.grad_input_stride = grad_input->stride(0);
  }
  call.rows = rows_of(list, mask, adapters, total);
  call.rank = static_cast<int>(rank);
  call.gate = static_cast<Gate>(gate);
  call.basis = words_of(basis, sets, padded, width, dtype);
  call.projection = words_of(projection, sets, 2 * padded, width, dtype);
  call.weights = pointer_to<float>(weights, ScalarType::Float, total * rank);
  call.update = pointer_to<float>(update, ScalarType::Float, total * rank);
  call.grad_weights = pointer_to<float>(grad_weights, ScalarType::Float, total * rank);
  call.grad_update = pointer_to<float>(grad_update, ScalarType::Float, total * rank);
  if (partial) {
    const baft::cuda::BackwardSlots needed = baft::cuda::backward_slots(call.rows, width, rank, dtype);
    const int64_t slots = needed.slots, parts = needed.parts;
    STD_TORCH_CHECK(partial_bias && slot_sets, "expected all of what the parameters' gradients take, or nothing");
    call.partial = pointer_to<float>(*partial, ScalarType::Float, slots * 3 * padded * width);
    call.partial_bias = pointer_to<float>(*partial_bias, ScalarType::Float, slots * parts * 2 * padded);
    call.slot_sets = pointer_to<int32_t>(*slot_sets, ScalarType::Int, slots);
  }
  check_launch(baft::cuda::launch_backward(call, width, dtype, stream_of(h)));
}

void backward_reduce(const Tensor& partial, const Tensor& partial_bias, const Tensor& slot_sets, const Tensor& basis,
                     const Tensor& source, const Tensor& source_bias, const std::optional<Tensor>& gate,
                     const std::optional<Tensor>& gate_bias) {
  STD_TORCH_CHECK(basis.dim() == 3, "expected gradients of parameter sets [N, r, d]");
  const int64_t sets = basis.size(0), rank = basis.size(1), width = basis.size(2), count = sets * rank * width;
  const int64_t slots = slot_sets.numel(), padded = baft::cuda::padded_rank(rank);
  baft::cuda::BackwardReduce call{};
  call.parts = static_cast<int>(partial_bias.numel() / (slots * 2 * padded));
  call.slots = static_cast<int>(slots);
  call.partial = pointer_to<float>(partial, ScalarType::Float, slots * 3 * padded * width);
  call.partial_bias = pointer_to<float>(partial_bias, ScalarType::Float, slots * call.parts * 2 * padded);
  call.slot_sets = pointer_to<int32_t>(slot_sets, ScalarType::Int, slots);
  call.sets = sets;
  call.rank = rank;
  call.padded_rank = padded;
  call.width = width;
  call.basis = pointer_to<float>(basis, ScalarType::Float, count);
  call.source = pointer_to<float>(source, ScalarType::Float, count);
  call.source_bias = pointer_to<float>(source_bias, ScalarType::Float, sets * rank);
  call.gate = pointer_to<float>(gate, ScalarType::Float, count);
  call.gate_bias = pointer_to<float>(gate_bias, ScalarType::Float, sets * rank);
  check_launch(baft::cuda::launch_backward_reduce(call, stream_of(basis)));
}

void retract(const std::vector<Tensor>& bases, const Tensor& distances, int64_t iterations, double near) {
  std::vector<baft::cuda::Basis> table;
  for (const Tensor& basis : bases) {
    STD_TORCH_CHECK(basis.dim() == 2, "expected bases [r, d]");
    table.push_back({pointer_to<float>(basis, ScalarType::Float, basis.numel()), static_cast<int>(basis.size(0)),
                     static_cast<int>(basis.size(1))});
  }
  const int64_t count = static_cast<int64_t>(table.size());
  check_launch(baft::cuda::launch_retract(
      table.data(), static_cast<int>(count), pointer_to<float>(distances, ScalarType::Float, count),
      static_cast<int>(iterations), static_cast<float>(near), stream_of(distances)));
}

void pack(const std::vector<Tensor>& basis, const std::vector<Tensor>& source, const std::vector<Tensor>& source_bias,
          const OptionalTensors& gate, const OptionalTensors& gate_bias, const OptionalTensors& forward_projection,
          const OptionalTensors& forward_basis, const OptionalTensors& bias, const OptionalTensors& backward_basis,
          const OptionalTensors& backward_projection, int64_t dtype) {
  const size_t count = basis.size();
  STD_TORCH_CHECK(count > 0, "expected layers to pack");
  for (const size_t size : {source.size(), source_bias.size(), gate.size(), gate_bias.size(), forward_projection.size(),
                            forward_basis.size(), bias.size(), backward_basis.size(), backward_projection.size()})
    STD_TORCH_CHECK(size == count, "expected lists of one length");
  const Dtype to = static_cast<Dtype>(dtype);
  std::vector<baft::cuda::Pack> layers(count);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(basis[i].dim() >= 2, "expected parameters [r, d], or sets of them [N, r, d]");
    baft::cuda::Pack& layer = layers[i];
    const int64_t numbers = basis[i].numel(), rank = basis[i].size(-2), width = basis[i].size(-1);
    const int64_t sets = numbers / (rank * width);
    layer.basis = pointer_to<float>(basis[i], ScalarType::Float, numbers);
    layer.source = pointer_to<float>(source[i], ScalarType::Float, numbers);
    layer.source_bias = pointer_to<float>(source_bias[i], ScalarType::Float, sets * rank);
    layer.gate = pointer_to<float>(gate[i], ScalarType::Float, numbers);
    layer.gate_bias = pointer_to<float>(gate_bias[i], ScalarType::Float, sets * rank);
    layer.sets = sets;
    layer.rank = rank;
    layer.width = width;
    layer.padded_rank = baft::cuda::padded_rank(rank);
    layer.forward_projection = words_of(forward_projection[i], sets, 2 * layer.padded_rank, width, to);
    layer.forward_basis = words_of(forward_basis[i], sets, layer.padded_rank, width, to);
    layer.backward_basis = words_of(backward_basis[i], sets, layer.padded_rank, width, to);
    layer.backward_projection = words_of(backward_projection[i], sets, 2 * layer.padded_rank, width, to);
    layer.bias = pointer_to<float>(bias[i], ScalarType::Float, sets * 2 * rank);
  }
  check_launch(baft::cuda::launch_pack(layers.data(), static_cast<int>(count), to, stream_of(basis[0])));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(baft_kernels, BAFT_DEVICE_KEY, library) {
  library.impl("cuda_forward", TORCH_BOX(&forward));
  library.impl("cuda_backward", TORCH_BOX(&backward));
  library.impl("cuda_backward_reduce", TORCH_BOX(&backward_reduce));
  library.impl("cuda_retract", TORCH_BOX(&retract));
  library.impl("cuda_pack", TORCH_BOX(&pack));
}

static PyObject* padded_rank(PyObject*, PyObject* rank) {
  return PyLong_FromLong(baft::cuda::padded_rank(PyLong_AsLong(rank)));
}

static PyObject* served(PyObject*, PyObject* number) {
  const int architecture = static_cast<int>(PyLong_AsLong(number));
  PyObject* found = PySet_New(nullptr);
  for (const int64_t width : baft::cuda::widths())
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (int64_t rank = 1; baft::cuda::padded_rank(rank) != 0; ++rank) {
        if (!baft::cuda::has_forward(width, rank, dtype) || !baft::cuda::has_backward(width, rank, dtype, architecture))
          continue;
        PyObject* shape = Py_BuildValue("LLi", static_cast<long long>(width), static_cast<long long>(rank),
                                        static_cast<int>(dtype));
        PySet_Add(found, shape);
        Py_DECREF(shape);
      }
  return found;
}

static PyObject* backward_slots(PyObject*, PyObject* arguments) {
  long width, rank, sequences, length;
  int dtype;
  if (!PyArg_ParseTuple(arguments, "llill", &width, &rank, &dtype, &sequences, &length)) return nullptr;
  const baft::cuda::Rows rows = {nullptr, nullptr, nullptr, sequences, length};
  const auto [slots, parts] = baft::cuda::backward_slots(rows, width, rank, static_cast<Dtype>(dtype));
  return Py_BuildValue("LL", static_cast<long long>(slots), static_cast<long long>(parts));
}

static PyMethodDef methods[] = {
    {"padded_rank", padded_rank, METH_O, "The rank that kernels for this one are compiled for, 0 for none."},
    {"served", served, METH_O,
     "The set of (width, rank, dtype as in kernels.h) with kernels for an architecture, 900 for sm_90."},
    {"backward_slots", backward_slots, METH_VARARGS,
     "Slots and parts that a backward pass takes: width, rank, dtype, sequences, their length."},
    {}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddIntConstant(made, "INTERFACE", 5); // see cpu_bindings.cpp
  return made;
}
