/* Which variants of the kernels this processor, and the system that runs on it, can execute. */
#include "variant.h"

#if defined(__x86_64__)
#include <cpuid.h>

#define FMA (1u << 12) /* leaf 1, ecx */
#define SAVED (1u << 27)
#define F16C (1u << 29)
#define AVX2 (1u << 5) /* leaf 7, ebx */
#define AVX512F (1u << 16)
#define AVX512DQ (1u << 17)
#define AVX512BW (1u << 30)
#define AVX512VL (1u << 31)
#define AVX512VNNI (1u << 11) /* leaf 7, ecx */
#define AVXVNNI (1u << 4)     /* leaf 7.1, eax */
#define YMM 0x06u             /* registers that the system keeps for each thread */
#define ZMM 0xe6u

typedef struct {
    unsigned eax, ebx, ecx, edx;
} Leaf;

static Leaf leaf(unsigned number, unsigned part) {
    Leaf found = {0, 0, 0, 0};
    __get_cpuid_count(number, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
    return found;
}

static unsigned saved_registers(void) {
    if (!(leaf(1, 0).ecx & SAVED)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

EXPORT int supports_avx2(void) {
    return has(saved_registers(), YMM) && has(leaf(1, 0).ecx, FMA | F16C) && has(leaf(7, 0).ebx, AVX2);
}
EXPORT int supports_avxvnni(void) { return supports_avx2() && has(leaf(7, 1).eax, AVXVNNI); }
EXPORT int supports_avx512(void) {
    Leaf seven = leaf(7, 0);
    return supports_avx2() && has(saved_registers(), ZMM) && has(seven.ebx, AVX512F | AVX512DQ | AVX512BW | AVX512VL) &&
           has(seven.ecx, AVX512VNNI);
}
#else
EXPORT int supports_avx2(void) { return 0; }
EXPORT int supports_avxvnni(void) { return 0; }
EXPORT int supports_avx512(void) { return 0; }
#endif

EXPORT int supports_plain(void) { return 1; }
