// Errors of the emulator as text, for Python: null if there is none.
#pragma once

#include <stdexcept>
#include <string>

template <class Work>
inline const char* reported(Work work) {
  static std::string problem;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
