/* What a GPU's generator draws: as in kernels/dropout.py, which takes 5 us for it. */

#include <stdint.h>

static int64_t drawn(uint64_t seed, uint64_t offset)
{
    uint64_t counter = offset / 4;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)c0 * 0xD2511F53, b = (uint64_t)c2 * 0xCD9E8D57;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    uint64_t words = (uint64_t)c0 << 32 | c1;
    return (int64_t)(words % UINT64_MAX - ((uint64_t)1 << 63));
}
