// The table of this instruction set.
#include "kernels.h"

#define EDGEVL_TEXT(x) #x
#define EDGEVL_NAME(x) EDGEVL_TEXT(x)

namespace edgevl {
namespace EDGEVL_ISA {

KernelTable table() {
    return {EDGEVL_NAME(EDGEVL_ISA),
            probe,
            embed_kernel,
            rms_norm_kernel,
            layer_norm_kernel,
            linear_kernel,
            rope_write_kernel,
            attention_kernel,
            silu_mul_kernel,
            gather_rows_kernel,
            patches_kernel,
            vision_tokens_kernel,
            full_attention_kernel,
            pixel_shuffle_kernel};
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
