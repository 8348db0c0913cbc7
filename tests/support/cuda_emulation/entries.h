// What the C functions beside this file share, and the seed of the orders.
#pragma once

#include <exception>
#include <string>

#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default"), used))
#define ENTRY EXPORTED const char*

// The message of what `call` throws, or nothing.
template <class Call>
const char* guarded(const Call& call) {
  static std::string message;
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

EXPORTED inline void order(unsigned seed) { emulation::seed = seed; }
