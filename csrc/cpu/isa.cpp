#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace entropic::cpu {

namespace {

bool runs(Isa isa) {
  switch (isa) {
    case PORTABLE:
      return true;
    case AVX2:
#ifdef ENTROPIC_HAS_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
    case AVX512:
#ifdef ENTROPIC_HAS_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
  }
  return false;
}

Isa best() {
  if (runs(AVX512)) return AVX512;
  if (runs(AVX2)) return AVX2;
  return PORTABLE;
}

std::atomic<int> forced{-1};

}  // namespace

Isa current_isa() {
  const int wish = forced.load(std::memory_order_relaxed);
  static const Isa automatic = best();
  return wish < 0 ? automatic : static_cast<Isa>(wish);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case AVX2:
      return "avx2";
    case AVX512:
      return "avx512";
    default:
      return "portable";
  }
}

const char* runnable_isas() {
  static const std::string names =
      std::string("portable") + (runs(AVX2) ? " avx2" : "") + (runs(AVX512) ? " avx512" : "");
  return names.c_str();
}

void use_isa(const char* name) {
  const std::string wish = name;
  if (wish.empty()) {
    forced = -1;
    return;
  }
  for (Isa isa : {PORTABLE, AVX2, AVX512}) {
    if (wish == isa_name(isa) && runs(isa)) {
      forced = isa;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + wish +
                              "' cannot run here; expected one of: " + runnable_isas());
}

}  // namespace entropic::cpu
