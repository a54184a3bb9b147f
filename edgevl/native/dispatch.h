// Which kernels this processor runs.
#pragma once

#include "types.h"

namespace edgevl {

// The best table that this processor supports, or the one that EDGEVL_ISA names (portable, avx2, avx512,
// avx512vnni, neon, neoni8mm). Throws std::invalid_argument when that name is unknown or the processor cannot
// run it.
KernelTable choose_kernels();

}  // namespace edgevl
