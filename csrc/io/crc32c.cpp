// SPDX-License-Identifier: Apache-2.0
#include "io/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "platform/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ds::io {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;

// ---- tables: eight bytes a round -----------------------------------------------------------------------------------

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables t{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t c = value;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1u) != 0 ? kPolynomial : 0u);
    t[0][value] = c;
  }
  for (uint32_t value = 0; value < 256; ++value) {
    for (size_t k = 1; k < 8; ++k) t[k][value] = (t[k - 1][value] >> 8) ^ t[0][t[k - 1][value] & 0xffu];
  }
  return t;
}

constexpr Tables kTables = make_tables();

uint32_t tables_register(const unsigned char* p, size_t n, uint32_t c) {
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= c;
    c = kTables[7][low & 0xffu] ^ kTables[6][(low >> 8) & 0xffu] ^ kTables[5][(low >> 16) & 0xffu] ^ kTables[4][low >> 24] ^
        kTables[3][high & 0xffu] ^ kTables[2][(high >> 8) & 0xffu] ^ kTables[1][(high >> 16) & 0xffu] ^ kTables[0][high >> 24];
  }
  for (; n > 0; --n, ++p) c = (c >> 8) ^ kTables[0][(c ^ *p) & 0xffu];
  return c;
}

// ---- the instruction, three strands at a time ----------------------------------------------------------------------
// One instruction takes three cycles and one can start in each, so three independent strands run abreast. Behind a strand of n
// bytes the register is multiplied by x^(8n) modulo the polynomial; for the fixed strand length that is four table look-ups.

constexpr size_t kStrand = 4096;

uint32_t multiply(uint32_t a, uint32_t b) {   // polynomials in reflected order: bit 31 is x^0
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b >> 1) ^ ((b & 1u) != 0 ? kPolynomial : 0u);
  }
  return product;
}

uint32_t power_of_x(uint64_t exponent) {
  uint32_t result = 0x80000000u, square = 0x40000000u;
  for (; exponent != 0; exponent >>= 1) {
    if ((exponent & 1u) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

class Shift {
 public:
  Shift() {
    const uint32_t factor = power_of_x(8 * kStrand);
    for (uint32_t k = 0; k < 4; ++k) {
      for (uint32_t value = 0; value < 256; ++value) table_[k][value] = multiply(factor, value << (8 * k));
    }
  }
  uint32_t operator()(uint32_t c) const {
    return table_[0][c & 0xffu] ^ table_[1][(c >> 8) & 0xffu] ^ table_[2][(c >> 16) & 0xffu] ^ table_[3][c >> 24];
  }

 private:
  uint32_t table_[4][256];
};

const Shift& shift() {
  static const Shift instance;
  return instance;
}

#if defined(__x86_64__)
#define DS_CRC_TARGET __attribute__((target("sse4.2")))
DS_CRC_TARGET inline uint32_t step8(uint32_t c, const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return static_cast<uint32_t>(_mm_crc32_u64(c, word));
}
DS_CRC_TARGET inline uint32_t step1(uint32_t c, unsigned char byte) { return _mm_crc32_u8(c, byte); }
bool has_instruction() { return platform::cpu_features().sse42; }
constexpr const char* kInstruction = "sse4.2";
#elif defined(__aarch64__)
#define DS_CRC_TARGET __attribute__((target("+crc")))
DS_CRC_TARGET inline uint32_t step8(uint32_t c, const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return __crc32cd(c, word);
}
DS_CRC_TARGET inline uint32_t step1(uint32_t c, unsigned char byte) { return __crc32cb(c, byte); }
bool has_instruction() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
constexpr const char* kInstruction = "armv8";
#endif

#ifdef DS_CRC_TARGET
DS_CRC_TARGET uint32_t instruction_register(const unsigned char* p, size_t n, uint32_t c) {
  const Shift& behind = shift();
  for (; n >= 3 * kStrand; n -= 3 * kStrand, p += 3 * kStrand) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < kStrand; i += 8) {
      c = step8(c, p + i);
      second = step8(second, p + kStrand + i);
      third = step8(third, p + 2 * kStrand + i);
    }
    c = behind(behind(c) ^ second) ^ third;
  }
  for (; n >= 8; n -= 8, p += 8) c = step8(c, p);
  for (; n > 0; --n, ++p) c = step1(c, *p);
  return c;
}
#else
bool has_instruction() { return false; }
constexpr const char* kInstruction = "tables";
uint32_t instruction_register(const unsigned char* p, size_t n, uint32_t c) { return tables_register(p, n, c); }
#endif

// ---- carry-less products, 256 bytes a round ------------------------------------------------------------------------
// Note [Folding]: bytes are the coefficients of a polynomial, the first byte's the highest, and only its remainder counts. So 16 bytes may be
// replaced by their product with x^D modulo the polynomial, added to the 16 bytes D bits behind. In this order of bits a carry-less product
// is the polynomials' product times x, hence the exponents less one. What is left at the end is summed as any message is.

#if defined(__x86_64__)
#define DS_CRC_FOLDS 1
__attribute__((target("avx512f,vpclmulqdq"))) uint32_t folding_register(const unsigned char* p, size_t n, uint32_t c) {
  constexpr size_t kRound = 256;
  constexpr uint64_t kBits = 8 * kRound;
  if (n < 2 * kRound) return instruction_register(p, n, c);
  // By which the first and the second eight bytes of sixteen are multiplied.
  static const uint64_t first = uint64_t{power_of_x(kBits + 64 - 1)} << 32, second = uint64_t{power_of_x(kBits - 1)} << 32;
  const auto a = static_cast<int64_t>(first), b = static_cast<int64_t>(second);
  const __m512i factors = _mm512_set_epi64(b, a, b, a, b, a, b, a);
  __m512i z[4];
  for (int i = 0; i < 4; ++i) z[i] = _mm512_loadu_si512(p + 64 * i);
  z[0] = _mm512_xor_si512(z[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(c))));
  for (n -= kRound, p += kRound; n >= kRound; n -= kRound, p += kRound) {
    for (int i = 0; i < 4; ++i) {
      const __m512i low = _mm512_clmulepi64_epi128(z[i], factors, 0x00), high = _mm512_clmulepi64_epi128(z[i], factors, 0x11);
      z[i] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(p + 64 * i), 0x96);   // the sum of the three
    }
  }
  alignas(64) unsigned char left[kRound];
  for (int i = 0; i < 4; ++i) _mm512_store_si512(left + 64 * i, z[i]);
  return instruction_register(p, n, instruction_register(left, kRound, 0));
}
#endif

using Register = uint32_t (*)(const unsigned char*, size_t, uint32_t);

struct Form {
  const char* name;
  Register run;
};

// What this machine can run, best first.
const std::vector<Form>& forms() {
  static const std::vector<Form> found = [] {
    std::vector<Form> list;
#ifdef DS_CRC_FOLDS
    if (platform::cpu_features().vpclmulqdq) list.push_back({"vpclmulqdq", folding_register});
#endif
    if (has_instruction()) list.push_back({kInstruction, instruction_register});
    list.push_back({"tables", tables_register});
    return list;
  }();
  return found;
}

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  return ~forms()[0].run(static_cast<const unsigned char*>(data), bytes, ~crc);
}

uint32_t crc32c_copy(void* dst, const void* src, size_t bytes, uint32_t crc) {
  constexpr size_t kPiece = 3 * kStrand;   // small enough that the copy is still in the nearest cache when it is summed
  const Register run = forms()[0].run;
  auto* to = static_cast<unsigned char*>(dst);
  const auto* from = static_cast<const unsigned char*>(src);
  uint32_t c = ~crc;
  while (bytes > 0) {
    const size_t n = std::min(bytes, kPiece);
    std::memcpy(to, from, n);
    c = run(to, n, c);
    to += n;
    from += n;
    bytes -= n;
  }
  return ~c;
}

uint32_t crc32c_by(const std::string& form, const void* data, size_t bytes, uint32_t crc) {
  for (const Form& f : forms()) {
    if (form == f.name) return ~f.run(static_cast<const unsigned char*>(data), bytes, ~crc);
  }
  DS_FAIL("this machine has no form '" << form << "' of CRC-32C");
}

std::vector<std::string> crc32c_forms() {
  std::vector<std::string> names;
  for (const Form& f : forms()) names.emplace_back(f.name);
  return names;
}

}  // namespace ds::io
