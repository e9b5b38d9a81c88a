// The Python module lsmha_fast._C_cuda. Importing it loads the library, whose static initialisers
// register the operators; it needs no GPU. Its one attribute lists the GPUs it was built for.

#include <Python.h>

#ifndef LSMHA_CUDA_ARCHITECTURES
#error "setup.py defines LSMHA_CUDA_ARCHITECTURES, such as \"8.0;9.0a\""
#endif

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module &&
      PyModule_AddStringConstant(module, "architectures", LSMHA_CUDA_ARCHITECTURES) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
