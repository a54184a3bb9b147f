#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(EDGEVL_X86)
#include <cpuid.h>
#elif defined(EDGEVL_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edgevl {

namespace portable {
KernelTable table();
}
#if defined(EDGEVL_X86)
namespace avx2 {
KernelTable table();
}
namespace avx512 {
KernelTable table();
}
namespace avx512vnni {
KernelTable table();
}
#elif defined(EDGEVL_ARM)
namespace neon {
KernelTable table();
}
namespace neoni8mm {
KernelTable table();
}
#endif

namespace {

struct Choice {
    const char* name;
    bool supported;
    KernelTable (*table)();
};

#if defined(EDGEVL_X86)
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}

bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(EDGEVL_ARM)
bool has_dot_products() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every Apple processor that Macs run on
#endif
}

bool has_row_pairs() {
#if defined(HWCAP2_I8MM)
    return has_dot_products() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#else
    return false;  // headers that do not know how to ask
#endif
}
#endif

}  // namespace

KernelTable choose_kernels() {
    const Choice choices[] = {
#if defined(EDGEVL_X86)
        {"avx512vnni", has_avx512() && __builtin_cpu_supports("avx512vnni"), avx512vnni::table},
        {"avx512", has_avx512(), avx512::table},
        {"avx2", has_avx2(), avx2::table},
#elif defined(EDGEVL_ARM)
        {"neoni8mm", has_row_pairs(), neoni8mm::table},
        {"neon", has_dot_products(), neon::table},
#endif
        {"portable", true, portable::table},
    };
    const char* wanted = std::getenv("EDGEVL_ISA");
    const bool forced = wanted != nullptr && *wanted != '\0';
    for (const Choice& choice : choices) {
        if (!forced && choice.supported) return choice.table();
        if (!forced || std::string(wanted) != choice.name) continue;
        if (choice.supported) return choice.table();
        throw std::invalid_argument("EDGEVL_ISA is " + std::string(wanted) +
                                    ", which this processor does not support; unset it to let edgevl choose");
    }
    std::string known;
    for (const Choice& choice : choices) known += (known.empty() ? "" : ", ") + std::string(choice.name);
    throw std::invalid_argument("EDGEVL_ISA is '" + std::string(wanted) + "'; this build knows " + known);
}

}  // namespace edgevl
