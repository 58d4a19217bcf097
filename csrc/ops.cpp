// The table of contents of the native side: every op's schema, and the module that Python imports.
// All ops are private; fused_ce/<stem>.py wraps them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/body.h"
#include "cpu/memory.h"
#if defined(FUSED_CE_WITH_CUDA)
#include "cuda/device.h"
#endif

// Options have defaults since every argument that a call names costs it 0.2 microseconds.
#define FUSED_CE_BCE_ARGUMENTS                                                                 \
  "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? sample_weight, "   \
  "Tensor? normalizer, int form, int reduction, ScalarType dtype, float label_smoothing=0.0, " \
  "int? ignore_index=None, float alpha=-1.0, float gamma=0.0, float? denominator=None, "       \
  "bool zero_on_empty=False"

#define FUSED_CE_SOFTMAX_CE_TENSORS \
  "Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer, "
#define FUSED_CE_SOFTMAX_CE_OPTIONS                                                       \
  "int reduction, ScalarType dtype, int ignore_index=-100, float label_smoothing=0.0, "   \
  "float softcap=0.0, float logit_scale=1.0, float z_loss=0.0, float? denominator=None, " \
  "bool zero_on_empty=False"
#define FUSED_CE_SOFTMAX_CE_RESULTS \
  "(Tensor loss, Tensor lse, Tensor entropy, Tensor prediction, Tensor correct)"

STABLE_TORCH_LIBRARY(fused_ce, m) {
  // csrc/{cpu,cuda}/bce.cpp
  m.def("_bce(" FUSED_CE_BCE_ARGUMENTS ") -> Tensor");
  m.def("_bce_with_gradient(Tensor(a!) gradient, " FUSED_CE_BCE_ARGUMENTS ") -> Tensor");
  // `written`: `gradient` holds that of a reduced loss whose upstream gradient is 1; where it is,
  // there is nothing to do. So it is in _softmax_ce_backward.
  m.def(
      "_bce_backward(Tensor(a!) gradient, bool written, Tensor grad_output, " FUSED_CE_BCE_ARGUMENTS
      ") -> ()");
  // csrc/{cpu,cuda}/softmax_ce.cpp
  m.def("_softmax_ce(" FUSED_CE_SOFTMAX_CE_TENSORS "int outputs, " FUSED_CE_SOFTMAX_CE_OPTIONS
        ") -> " FUSED_CE_SOFTMAX_CE_RESULTS);
  m.def("_softmax_ce_with_gradient(Tensor(a!) gradient, " FUSED_CE_SOFTMAX_CE_TENSORS
        "int outputs, " FUSED_CE_SOFTMAX_CE_OPTIONS ") -> " FUSED_CE_SOFTMAX_CE_RESULTS);
  m.def(
      "_softmax_ce_backward(Tensor(a!) gradient, bool written, Tensor? grad_loss, "
      "Tensor? grad_lse, Tensor? grad_entropy, Tensor? lse, Tensor? "
      "entropy, " FUSED_CE_SOFTMAX_CE_TENSORS FUSED_CE_SOFTMAX_CE_OPTIONS ") -> ()");
  // csrc/cpu/memory.cpp
  m.def("_empty_gradient(Tensor logits) -> Tensor");
  // csrc/{cpu,cuda}/scale.cpp
  m.def("_scale_(Tensor(a!) gradient, Tensor scale) -> ()");
}

namespace {

// What `python -m fused_ce info` shows of this build, one "name=value" a line.
PyObject* build_info(PyObject*, PyObject*) {
  std::string text = std::string("architectures=") + FUSED_CE_CUDA_ARCHITECTURES +
                     "\ntoolkit=" + FUSED_CE_CUDA_TOOLKIT +
                     "\ncapability=" + fused_ce::cpu_bodies().name;
  return PyUnicode_FromString(text.c_str());
}

// The bad input that a CUDA kernel has reported since the last call, as a message, or an empty
// string.
PyObject* take_report(PyObject*, PyObject*) {
#if defined(FUSED_CE_WITH_CUDA)
  return PyUnicode_FromString(fused_ce::take_report().c_str());
#else
  return PyUnicode_FromString("");
#endif
}

PyObject* release_gradients(PyObject*, PyObject*) {
  fused_ce::release_gradients();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr},
                         {"release_gradients", release_gradients, METH_NOARGS, nullptr},
                         {"take_report", take_report, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&module_definition);
}
