// Vectors of one register's width, from the compiler's vector extensions: loads, stores, exp and tanh.
//
// Included once per instruction set, each time in a namespace of its own (CONSPO_ISA) and with CONSPO_VECTOR_BYTES set,
// after the pragma that turns the instruction set on. It includes nothing that defines functions: an inline function
// of a common header, compiled here with AVX-512, could be the copy that the linker keeps for everybody.

// How vectors are passed depends on the instruction set; nothing here is called from where another one is on.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace conspo {
namespace CONSPO_ISA {

template <typename T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Float __attribute__((vector_size(CONSPO_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(CONSPO_VECTOR_BYTES)));
  typedef uint16_t Short __attribute__((vector_size(CONSPO_VECTOR_BYTES / 2)));
};

template <>
struct VectorOf<double> {
  typedef double Float __attribute__((vector_size(CONSPO_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(CONSPO_VECTOR_BYTES)));
};

template <typename T>
using Float = typename VectorOf<T>::Float;
template <typename T>
using Int = typename VectorOf<T>::Int;
using Short = VectorOf<float>::Short;

template <typename T>
constexpr int LANES = CONSPO_VECTOR_BYTES / int(sizeof(T));
template <typename T>
constexpr T INFINITE = T(__builtin_inf());

// One type of vector's bits as another's.
template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline Float<T> broadcast(T value) {
  return Float<T>{} + value;
}

template <typename T>
inline Float<T> max(Float<T> a, Float<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline T max_lane(Float<T> v) {
  T found = v[0];
  for (int i = 1; i < LANES<T>; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

// Lanes are added in order: the same bits whoever runs it.
template <typename T>
inline double sum_lanes(Float<T> v) {
  double sum = 0;
  for (int i = 0; i < LANES<T>; ++i) sum += double(v[i]);
  return sum;
}

// ---- elements of memory as vectors of the type that is computed in --------------------------------------------------

// What one load of a full register becomes: one vector, or two of bf16, which has fp32's upper half.
template <typename E>
struct Accumulate {
  using Type = float;
  static constexpr int VECTORS = 1;
};
template <>
struct Accumulate<double> {
  using Type = double;
  static constexpr int VECTORS = 1;
};
template <>
struct Accumulate<BFloat16> {
  using Type = float;
  static constexpr int VECTORS = 2;
};

template <typename E>
struct Pack {
  static constexpr int VECTORS = Accumulate<E>::VECTORS;
  static constexpr int SIZE = VECTORS * LANES<typename Accumulate<E>::Type>;
  Float<typename Accumulate<E>::Type> v[VECTORS];
};

template <typename To>
inline To load_bits(const void* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

inline Pack<float> load(const float* from) { return {{load_bits<Float<float>>(from)}}; }
inline Pack<double> load(const double* from) { return {{load_bits<Float<double>>(from)}}; }
inline void store(float* to, const Pack<float>& pack) { __builtin_memcpy(to, &pack, sizeof(pack)); }
inline void store(double* to, const Pack<double>& pack) { __builtin_memcpy(to, &pack, sizeof(pack)); }

// The first of two neighbours is the lower half of 32 bits (on the little-endian CPUs that this is for), and both become
// fp32 where they are: no shuffle, at the price of vectors that hold every second element.
inline Pack<BFloat16> load(const BFloat16* from) {
  const Int<float> both = load_bits<Int<float>>(from);
  return {{bits<Float<float>>(both << 16), bits<Float<float>>(both & -0x10000)}};
}

// To the nearest, ties to even, by the carry. A NaN stays one unless its mantissa is all ones below bf16's digits: what
// comes from bf16 has zeros there, and so has what the caller passes.
inline void store(BFloat16* to, const Pack<BFloat16>& pack) {
  const auto rounded = [](Float<float> v) {
    const Int<float> b = bits<Int<float>>(v);
    return b + 0x7fff + ((b >> 16) & 1);
  };
  const Int<float> low = (rounded(pack.v[0]) >> 16) & 0xffff;
  const Int<float> both = low | (rounded(pack.v[1]) & -0x10000);
  __builtin_memcpy(to, &both, sizeof(both));
}

// fp32 in bf16, any NaN as one.
inline void store_narrow(BFloat16* to, const Pack<float>& pack) {
  const Float<float> v = pack.v[0];
  const Int<float> b = bits<Int<float>>(v);
  const Int<float> rounded = v == v ? (b + 0x7fff + ((b >> 16) & 1)) >> 16 : Int<float>{} + 0x7fc0;
  const Short shorts = __builtin_convertvector(rounded & 0xffff, Short);
  __builtin_memcpy(to, &shorts, sizeof(shorts));
}

// With the masks of all lanes, for GCC 12 takes the plain forms for reads of something uninitialised.
#if defined(__x86_64__) && CONSPO_VECTOR_BYTES == 64
inline Pack<Half> load(const Half* from) {
  return {{bits<Float<float>>(_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from)))}};
}
inline void store(Half* to, const Pack<Half>& pack) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(pack.v[0]), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof(half));
}
#elif defined(__x86_64__) && CONSPO_VECTOR_BYTES == 32
inline Pack<Half> load(const Half* from) {
  return {{bits<Float<float>>(_mm256_cvtph_ps(load_bits<__m128i>(from)))}};
}
inline void store(Half* to, const Pack<Half>& pack) {
  const __m128i half = _mm256_cvtps_ph(bits<__m256>(pack.v[0]), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof(half));
}
#else
// Sign, and exponent and mantissa moved to where fp32 has them, their exponent 112 too small: a factor that is exact,
// for subnormal numbers too. What was infinity or NaN gets the exponent of both.
inline Pack<Half> load(const Half* from) {
  const Int<float> half = __builtin_convertvector(load_bits<Short>(from), Int<float>);
  const Int<float> magnitude = (half & 0x7fff) << 13;
  const Int<float> finite = bits<Int<float>>(bits<Float<float>>(magnitude) * 0x1p112f);
  const Int<float> number = (half & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : finite;
  return {{bits<Float<float>>(number | ((half & 0x8000) << 16))}};
}

// To the nearest, ties to even. Below 2^-14 the spacing is 2^-24: adding 0.5, whose fp32 neighbours are that far apart,
// rounds there and leaves the digits at the low end. 65,520 and more is infinity.
inline void store(Half* to, const Pack<Half>& pack) {
  const Int<float> b = bits<Int<float>>(pack.v[0]);
  const Int<float> sign = (b >> 16) & 0x8000;
  const Int<float> magnitude = b & 0x7fffffff;
  const Int<float> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Int<float> subnormal = bits<Int<float>>(bits<Float<float>>(magnitude) + 0.5f) - 0x3f000000;
  Int<float> half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? (magnitude > 0x7f800000 ? Int<float>{} + 0x7e00 : Int<float>{} + 0x7c00) : half;
  const Short shorts = __builtin_convertvector(half | sign, Short);
  __builtin_memcpy(to, &shorts, sizeof(shorts));
}
#endif
inline void store_narrow(Half* to, const Pack<float>& pack) { store(to, Pack<Half>{{pack.v[0]}}); }

// ---- exp ------------------------------------------------------------------------------------------------------------

// exp(x * scale) = 2^n 2^r with x * scale * log2 e = n + r and |r| <= 1/2; 2^r = 1 + r Q(r), Q of the coefficients below.
//
// So that r has all its digits: with a fused multiply-add the factor scale * log2 e is kept in two parts, and x * high - n
// is rounded once. Without one, n ln 2 is taken off instead, its first part with so few digits that n * LN_2_HIGH is exact.
template <typename T>
struct Exp;

// The polynomial whose largest relative error on [-1/2, 1/2] is least (2.6e-9), by Remez' algorithm, rounded to fp32.
template <>
struct Exp<float> {
  static constexpr int BIAS = 127, MANTISSA = 23, COEFFICIENTS = 6;
  static constexpr float Q[] = {
      0x1.62e432p-1f, 0x1.ebfbe2p-3f, 0x1.c6ae72p-5f, 0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f};
  static constexpr float LN_2_HIGH = 0x1.63p-1f, LN_2_LOW = -0x1.bd0106p-13f;
  static constexpr float SMALLEST = -126, LOWEST = -152, HIGHEST = 129;  // of n: normal results, results above 0, finite
};

// (ln 2)^k / k!, Taylor's: what is left out is 4e-18.
template <>
struct Exp<double> {
  static constexpr int BIAS = 1023, MANTISSA = 52, COEFFICIENTS = 13;
  static constexpr double Q[] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e77p-7,
      0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
      0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
      0x1.816193166d0f9p-40};
  static constexpr double LN_2_HIGH = 0x1.62e42fep-1, LN_2_LOW = 0x1.f473de6af278fp-30;
  static constexpr double SMALLEST = -1022, LOWEST = -1076, HIGHEST = 1025;
};

template <typename T>
class Exponential {
 public:
  explicit Exponential(double scale) {
    constexpr double LOG2_E = 0x1.71547652b82fep+0, REST = 0x1.777d0ffda0d24p-56;
    const double product = scale * LOG2_E;
    high_ = T(product);
    low_ = T((product - double(high_)) + (__builtin_fma(scale, LOG2_E, -product) + scale * REST));
    smallest_ = T(Exp<T>::SMALLEST / product);
    scale_ = T(scale);
  }

  // For x <= 0, what a softmax needs: results below the smallest normal number are 0, also that of -inf. NaN stays NaN.
  Float<T> of_negative(Float<T> x) const {
    const Reduced at = reduce(x);
    const Float<T> value = (1 + at.r * polynomial(at.r)) * power_of_2(at.biased);
    return x < smallest_ ? broadcast<T>(0) : value;
  }

  // Everywhere. 2^n alone may be out of range where the result is not: it is multiplied in by halves.
  Float<T> of(Float<T> x) const {
    const T lowest = Exp<T>::LOWEST / high_, highest = Exp<T>::HIGHEST / high_;
    x = x < lowest ? broadcast<T>(lowest) : x;
    x = x > highest ? broadcast<T>(highest) : x;
    const Reduced at = reduce(x);
    const Int<T> n = at.biased - bits<Int<T>>(broadcast<T>(ROUND));
    const Int<T> half = n >> 1;
    return (1 + at.r * polynomial(at.r)) * power_of_2(half + Exp<T>::BIAS) * power_of_2(n - half + Exp<T>::BIAS);
  }

  // exp(x) - 1 with the digits of a small x.
  Float<T> minus_1(Float<T> x) const {
    const Reduced at = reduce(x);
    const Float<T> factor = power_of_2(at.biased);
    return factor * (at.r * polynomial(at.r)) + (factor - 1);
  }

 private:
  // x + ROUND has the nearest integer of x in its low bits, the bias of the exponent added.
  static constexpr T ROUND = T(1.5) * T(uint64_t(1) << Exp<T>::MANTISSA) + Exp<T>::BIAS;

  struct Reduced {
    Float<T> r;
    Int<T> biased;  // n + BIAS in the low bits
  };

  Reduced reduce(Float<T> x) const {
    const Float<T> shifted = x * high_ + ROUND;
    const Float<T> n = shifted - ROUND;
#if CONSPO_FUSED_MULTIPLY_ADD
    const Float<T> r = (x * high_ - n) + x * low_;
#else
    const Float<T> r = ((x * scale_ - n * Exp<T>::LN_2_HIGH) - n * Exp<T>::LN_2_LOW) * T(0x1.71547652b82fep+0);
#endif
    return {r, bits<Int<T>>(shifted)};
  }

  static Float<T> polynomial(Float<T> r) {
    Float<T> q = broadcast<T>(Exp<T>::Q[Exp<T>::COEFFICIENTS - 1]);
    for (int k = Exp<T>::COEFFICIENTS - 2; k >= 0; --k) q = q * r + Exp<T>::Q[k];
    return q;
  }

  static Float<T> power_of_2(Int<T> biased) { return bits<Float<T>>(biased << Exp<T>::MANTISSA); }

  T high_, low_, smallest_, scale_;
};

// tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1.
template <typename T>
inline Float<T> tanh(Float<T> x) {
  constexpr T SATURATED = sizeof(T) == 4 ? T(10) : T(20);
  const Float<T> size = x < 0 ? -x : x;
  const Float<T> e = Exponential<T>(2).minus_1(size > SATURATED ? broadcast<T>(SATURATED) : size);
  const Float<T> value = e / (e + 2);
  return x < 0 ? -value : value;
}

}  // namespace CONSPO_ISA
}  // namespace conspo
