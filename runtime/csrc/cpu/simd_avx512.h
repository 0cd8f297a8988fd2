// Sixteen lanes in one register: AVX-512 with VNNI.
#pragma once
#include <immintrin.h>

typedef __m512 vf;   // 16 floats
typedef __m512i vi;  // 16 int32, or 64 bytes

// Byte fields are multiplied where they stand, unshifted: VPDPBUSD takes all of 0..255.
static constexpr bool kInPlace = true;

SI vf f_zero() { return _mm512_setzero_ps(); }
SI vf f_set(float x) { return _mm512_set1_ps(x); }
SI vf f_load(const float* p) { return _mm512_loadu_ps(p); }
SI void f_store(float* p, vf x) { _mm512_storeu_ps(p, x); }
SI vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
SI vf f_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
SI vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
SI vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
SI vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
SI vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
SI vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
SI vf f_abs(vf a) { return _mm512_abs_ps(a); }
SI vf f_from_i(vi a) { return _mm512_cvtepi32_ps(a); }
SI vi f_round(vf a) { return _mm512_cvtps_epi32(a); }
SI vf f_load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
SI vf f_load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
SI vf f_load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
SI vf f_load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
SI void f_store_f16(uint16_t* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
SI float f_max_all(vf x) { return _mm512_reduce_max_ps(x); }
SI float f_sum_all(vf x) { return _mm512_reduce_add_ps(x); }
SI vf f_power(vi n) {  // 2**n
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
SI vf f_first(vf x, int count) {  // the first `count` lanes, and minus infinity
    const __mmask16 keep = (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
    return _mm512_mask_blend_ps(keep, _mm512_set1_ps(-__builtin_inff()), x);
}

SI vi i_zero() { return _mm512_setzero_si512(); }
SI vi i_load(const void* p) { return _mm512_loadu_si512(p); }
SI void i_store(void* p, vi x) { _mm512_storeu_si512(p, x); }
SI vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
SI vi i_or(vi a, vi b) { return _mm512_or_si512(a, b); }
SI vi i_and_bytes(vi a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi8((char)mask)); }
SI vi i_low_byte(vi a) { return _mm512_and_si512(a, _mm512_set1_epi32(255)); }
template <int N>
SI vi i_shl(vi a) { return _mm512_slli_epi32(a, N); }
template <int N>
SI vi i_shr(vi a) { return _mm512_srli_epi32(a, N); }
SI void i_store_i8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
// Adds to each lane the products of its four unsigned bytes of `w` with the four signed ones of x.
SI vi i_dot4(vi acc, vi w, int32_t x) {
    // Written out: compilers copy the accumulator around the intrinsic.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(x)));
    return acc;
}
SI int32_t i_sum_all(vi a) { return _mm512_reduce_add_epi32(a); }
