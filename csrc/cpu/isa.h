// Which instruction set the CPU kernels run on, chosen when the process starts.
#pragma once

namespace entropic::cpu {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// The set in use: the best that was compiled and that this processor has, unless forced.
Isa current_isa();
const char* isa_name(Isa isa);

// Forces a set by name; throws std::invalid_argument if unknown, not compiled or not supported.
// "" returns to the automatic choice.
void use_isa(const char* name);

// Names of the sets that can run here, separated by spaces, slowest first.
const char* runnable_isas();

// Declarations, once in the namespace of each instruction set. Every file of cpu/simd and
// cpu/simd_exact defines one table of functions per set; a driver beside this file uses it.
#define ENTROPIC_FOR_EACH_ISA(...) \
  namespace portable {             \
  __VA_ARGS__                      \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__                      \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__                      \
  }

#ifdef ENTROPIC_HAS_AVX2
#define ENTROPIC_AVX2(table) &avx2::table
#else
#define ENTROPIC_AVX2(table) nullptr
#endif
#ifdef ENTROPIC_HAS_AVX512
#define ENTROPIC_AVX512(table) &avx512::table
#else
#define ENTROPIC_AVX512(table) nullptr
#endif

// The table of this name for the instruction set in use.
#define ENTROPIC_TABLE(table) \
  (*choose_table(&portable::table, ENTROPIC_AVX2(table), ENTROPIC_AVX512(table)))

template <typename Table>
struct Same {
  using Type = Table;
};

template <typename Table>
static inline Table* choose_table(Table* portable, typename Same<Table>::Type* avx2,
                                  typename Same<Table>::Type* avx512) {
  const Isa isa = current_isa();
  return isa == AVX512 && avx512 ? avx512 : isa == AVX2 && avx2 ? avx2 : portable;
}

}  // namespace entropic::cpu
