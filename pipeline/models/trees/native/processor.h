/* Which kernels this processor, and its operating system, can run.
 *
 * Not __builtin_cpu_supports, which answers from a table that Zig's runtime library does not have. */
#ifndef TREES_PROCESSOR_H
#define TREES_PROCESSOR_H

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>

/* Return the state of registers that the operating system saves: bits 1 and 2 for AVX, 5 to 7 for AVX-512. */
static uint32_t saved_state(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Return 2, 3 or 4 for kernels of x86-64-v2, -v3 or -v4; 0 for none. The instructions are those that
 * build_support/native.py compiles for. */
static int processor_level(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_2) || !(c & bit_POPCNT))
        return 0;
    if (!(c & bit_AVX) || (saved_state() & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 2;
    if (!(b & bit_AVX2) || !(b & bit_BMI2))
        return 2;
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (saved_state() & 0xE6) == 0xE6 && (b & wide) == wide ? 4 : 3;
}

#endif
#endif
