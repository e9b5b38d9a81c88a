// The Python module lsmha_fast._C. Importing it loads the library, whose static initialisers register
// the operators; the module itself is empty.

#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
