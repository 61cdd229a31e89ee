// The row kernels of token log-probabilities: statistics (forward) and gradient (backward) of a part of a row.
//
// Included once per instruction set, as vector.h is.

namespace conspo {
namespace CONSPO_ISA {

// Elements whose maximum is taken before their exponentials are: they come from memory for the one and from the L1 cache
// for the other, while the next block is fetched. A lane of the sum adds at most 4096 / 16 terms in fp32, the blocks' sums
// are added in fp64. A block is PIECES<E> runs of elements, far apart: from so many places at once the memory gives more.
constexpr int64_t BLOCK = 4096;
constexpr int UNROLLED = 4;
template <typename E>
constexpr int PIECES = UNROLLED / Pack<E>::VECTORS;
// Backward's runs of elements: with two bytes each it is the arithmetic that takes longest, and more runs cost time.
template <typename E>
constexpr int RUNS = sizeof(E) == 2 ? 1 : 4;
constexpr int64_t AHEAD = 2048;  // elements that backward fetches ahead: what the CPU does by itself ends with a page

// u and du/dz; -inf, a masked entry of the vocabulary, stays -inf.
template <typename T, bool CAPPED>
struct Capped {
  T inner;

  Float<T> value(Float<T> z) const {
    if constexpr (!CAPPED) return z;
    return z == -INFINITE<T> ? z : tanh<T>(z * inner);
  }

  Float<T> slope(Float<T> z, Float<T> u) const {
    if constexpr (!CAPPED) return broadcast<T>(1);
    return z == -INFINITE<T> ? broadcast<T>(0) : (1 - u * u) * inner;
  }
};

// The last elements of a part, fewer than a pack's, with what is missing filled up.
template <typename E>
inline Pack<E> load_tail(const E* from, int count, E fill) {
  E elements[Pack<E>::SIZE];
  for (int i = 0; i < Pack<E>::SIZE; ++i) elements[i] = i < count ? from[i] : fill;
  return load(elements);
}

template <typename E>
inline void store_tail(E* to, const Pack<E>& pack, int count) {
  E elements[Pack<E>::SIZE];
  store(elements, pack);
  for (int i = 0; i < count; ++i) to[i] = elements[i];
}

template <typename E>
constexpr E MINUS_INFINITY = E(-__builtin_inf());
template <>
constexpr BFloat16 MINUS_INFINITY<BFloat16> = {0xff80};
template <>
constexpr Half MINUS_INFINITY<Half> = {0xfc00};

// Joins the maximum of a new block to what is known of the blocks before it: their sums are of exponentials that are now
// relative to another maximum.
inline void raise(Statistics& part, double block_max, double scale) {
  if (!(block_max > part.max)) return;
  const double shift = (part.max - block_max) * scale, factor = __builtin_exp(shift);
  part.max = block_max;
  part.moment = factor == 0 ? 0 : factor * (part.moment + shift * part.sum);
  part.sum = factor == 0 ? 0 : factor * part.sum;
}

// Pieces of a block: `length` elements, whole packs, each `apart` from the one before; the next block's are `ahead`.
struct Pieces {
  int64_t length, apart, ahead;
};

// Maximum and, with it known, sums of a block.
template <typename E, bool CAPPED, bool ENTROPY>
inline void fold_block(const E* z, const Pieces& pieces, const Transform& transform, Statistics& part) {
  using T = typename Accumulate<E>::Type;
  constexpr int SIZE = Pack<E>::SIZE, VECTORS = Pack<E>::VECTORS;
  const Capped<T, CAPPED> capped{T(transform.inner)};
  Float<T> kept[CAPPED ? BLOCK / LANES<T> : 1];  // a tanh is worth keeping, a conversion is not

  Float<T> largest[UNROLLED];
  for (auto& v : largest) v = broadcast<T>(-INFINITE<T>);
  for (int64_t i = 0; i < pieces.length; i += SIZE) {
    for (int j = 0; j < PIECES<E>; ++j) {
      const Pack<E> pack = load(z + j * pieces.apart + i);
      for (int k = 0; k < VECTORS; ++k) {
        const Float<T> u = capped.value(pack.v[k]);
        if constexpr (CAPPED) kept[i / LANES<T> * PIECES<E> + j * VECTORS + k] = u;
        largest[j * VECTORS + k] = max<T>(u, largest[j * VECTORS + k]);
      }
    }
  }
  raise(part, double(max_lane<T>(max<T>(max<T>(largest[0], largest[1]), max<T>(largest[2], largest[3])))),
        transform.scale);

  // Of entries that are all -inf so far the maximum is -inf; their exponentials are 0 beside any finite number.
  const T m = part.max == -__builtin_inf() ? T(0) : T(part.max), scale = T(transform.scale);
  const Exponential<T> exponential(transform.scale);
  Float<T> sum[UNROLLED], moment[UNROLLED];
  for (int j = 0; j < UNROLLED; ++j) sum[j] = moment[j] = broadcast<T>(0);
  for (int64_t i = 0; i < pieces.length; i += SIZE) {
    for (int j = 0; j < PIECES<E>; ++j) {
      const E* at = z + j * pieces.apart + i;
      __builtin_prefetch(at + pieces.ahead);
      Pack<E> u;
      if constexpr (!CAPPED) u = load(at);
      for (int k = 0; k < VECTORS; ++k) {
        if constexpr (CAPPED) u.v[k] = kept[i / LANES<T> * PIECES<E> + j * VECTORS + k];
        const Float<T> d = u.v[k] - m, e = exponential.of_negative(d);
        sum[j * VECTORS + k] += e;
        if constexpr (ENTROPY) moment[j * VECTORS + k] += e > 0 ? e * (d * scale) : broadcast<T>(0);
      }
    }
  }
  for (const auto& v : sum) part.sum += sum_lanes<T>(v);
  if constexpr (ENTROPY)
    for (const auto& v : moment) part.moment += sum_lanes<T>(v);
}

template <typename E, bool CAPPED, bool ENTROPY>
void statistics_of(const E* row, int64_t begin, int64_t end, const Transform& transform, Statistics* out) {
  constexpr int64_t SIZE = Pack<E>::SIZE, SHORTEST = SIZE * PIECES<E>, LENGTH = BLOCK / PIECES<E>;
  Statistics part{-__builtin_inf(), 0, 0};
  const int64_t apart = (end - begin) / SHORTEST * SIZE;
  for (int64_t at = 0; at < apart; at += LENGTH) {
    const bool last = apart - at <= LENGTH;  // what follows is the part behind this one
    const Pieces pieces{last ? apart - at : LENGTH, apart, last ? end - begin - at : LENGTH};
    fold_block<E, CAPPED, ENTROPY>(row + begin + at, pieces, transform, part);
  }
  const int64_t folded = begin + PIECES<E> * apart;
  if (folded < end) {
    E rest[SHORTEST];
    for (int64_t i = 0; i < SHORTEST; ++i) rest[i] = i < end - folded ? row[folded + i] : MINUS_INFINITY<E>;
    fold_block<E, CAPPED, ENTROPY>(rest, {SIZE, SIZE, 0}, transform, part);
  }
  *out = part;
}

template <typename E>
void statistics(
    const void* row, int64_t begin, int64_t end, const Transform& transform, bool entropy, Statistics* out) {
  const E* z = static_cast<const E*>(row);
  if (transform.capped) {
    entropy ? statistics_of<E, true, true>(z, begin, end, transform, out)
            : statistics_of<E, true, false>(z, begin, end, transform, out);
  } else {
    entropy ? statistics_of<E, false, true>(z, begin, end, transform, out)
            : statistics_of<E, false, false>(z, begin, end, transform, out);
  }
}

struct Label {
  static constexpr bool IS_LABEL = true;
};
struct Elsewhere {
  static constexpr bool IS_LABEL = false;
};

// The gradients of a row's logits.
template <typename T, bool CAPPED, bool ENTROPY>
class Gradients {
 public:
  Gradients(const Transform& transform, const RowGradient& given)
      : capped{T(transform.inner)}, exponential(1), m(number(given.max)), scale(T(transform.scale)),
        log_sum(number(given.log_sum)), c(number(given.c * transform.scale)), h(number(given.h * transform.scale)),
        entropy(number(given.entropy)) {}

  template <typename E, typename Place>
  Pack<E> operator()(Pack<E> z, Place) const {
    for (auto& v : z.v) {
      const Float<T> u = capped.value(v);
      const Float<T> log_p = (u - m) * scale - log_sum;
      const Float<T> p = exponential.of_negative(log_p);
      Float<T> g = Place::IS_LABEL ? c * (1 - p) : -c * p;
      if constexpr (ENTROPY) g -= h * ((p > 0 ? p * log_p : broadcast<T>(0)) + p * entropy);
      if constexpr (CAPPED) g *= capped.slope(v, u);
      v = g;
    }
    return z;
  }

 private:
  // A NaN that is passed on has zeros where bf16 has no digits.
  static T number(double x) { return x == x ? T(x) : T(__builtin_nan("")); }

  const Capped<T, CAPPED> capped;
  const Exponential<T> exponential;
  const T m, scale, log_sum, c, h, entropy;
};

template <typename E, bool CAPPED, bool ENTROPY>
void gradient_of(
    E* to, const E* row, int64_t begin, int64_t end, const Transform& transform, const RowGradient& given) {
  constexpr int SIZE = Pack<E>::SIZE;
  const Gradients<typename Accumulate<E>::Type, CAPPED, ENTROPY> gradients(transform, given);

  // The label's element is computed apart, before it may be written over, and stored last.
  const bool has_label = begin <= given.label && given.label < end;
  E at_label[SIZE];
  if (has_label) store(at_label, gradients(load_tail(row + given.label, 1, row[given.label]), Label{}));
  const auto pack = [&](int64_t at) { store(to + at, gradients(load(row + at), Elsewhere{})); };
  const int64_t apart = (end - begin) / (RUNS<E> * SIZE) * SIZE;
  for (int64_t i = begin; i < begin + apart; i += SIZE) {
    for (int j = 0; j < RUNS<E>; ++j) {
      const int64_t at = i + j * apart;
      __builtin_prefetch(row + at + AHEAD / RUNS<E>);
      pack(at);
    }
  }
  int64_t i = begin + RUNS<E> * apart;
  for (; i + SIZE <= end; i += SIZE) pack(i);
  if (i < end) store_tail(to + i, gradients(load_tail(row + i, int(end - i), row[i]), Elsewhere{}), int(end - i));
  if (has_label) to[given.label] = at_label[0];
}

template <typename E>
void gradient(
    void* to, const void* row, int64_t begin, int64_t end, const Transform& transform, const RowGradient& given) {
  E* out = static_cast<E*>(to);
  const E* z = static_cast<const E*>(row);
  if (transform.capped) {
    given.h != 0 ? gradient_of<E, true, true>(out, z, begin, end, transform, given)
                 : gradient_of<E, true, false>(out, z, begin, end, transform, given);
  } else {
    given.h != 0 ? gradient_of<E, false, true>(out, z, begin, end, transform, given)
                 : gradient_of<E, false, false>(out, z, begin, end, transform, given);
  }
}

// From the end: an element is written twice as near to the end of a row as it was.
template <typename To, bool CAPPED, bool ENTROPY>
void narrow_gradient_of(
    To* to, const float* row, int64_t count, const Transform& transform, const RowGradient& given) {
  constexpr int SIZE = Pack<float>::SIZE;
  const Gradients<float, CAPPED, ENTROPY> gradients(transform, given);
  const bool has_label = 0 <= given.label && given.label < count;
  To at_label[SIZE], rest[SIZE];
  if (has_label) store_narrow(at_label, gradients(load_tail(row + given.label, 1, row[given.label]), Label{}));
  int64_t i = count / SIZE * SIZE;
  if (i < count) {
    store_narrow(rest, gradients(load_tail(row + i, int(count - i), row[i]), Elsewhere{}));
    for (int64_t j = i; j < count; ++j) to[j] = rest[j - i];
  }
  for (i -= SIZE; i >= 0; i -= SIZE) {
    if (i >= AHEAD) __builtin_prefetch(row + i - AHEAD);
    store_narrow(to + i, gradients(load(row + i), Elsewhere{}));
  }
  if (has_label) to[given.label] = at_label[0];
}

template <typename To>
void narrow_gradient(
    void* to, const void* row, int64_t count, const Transform& transform, const RowGradient& given) {
  To* out = static_cast<To*>(to);
  const float* z = static_cast<const float*>(row);
  if (transform.capped) {
    given.h != 0 ? narrow_gradient_of<To, true, true>(out, z, count, transform, given)
                 : narrow_gradient_of<To, true, false>(out, z, count, transform, given);
  } else {
    given.h != 0 ? narrow_gradient_of<To, false, true>(out, z, count, transform, given)
                 : narrow_gradient_of<To, false, false>(out, z, count, transform, given);
  }
}

// The exponentials themselves, for their test.
template <typename T>
void exp_each(void* to, const void* from, int64_t count, bool negative) {
  const Exponential<T> exponential(1);
  T* out = static_cast<T*>(to);
  const T* in = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const int n = int(count - i < LANES<T> ? count - i : LANES<T>);
    Pack<T> x = load_tail(in + i, n, T(0));
    x.v[0] = negative ? exponential.of_negative(x.v[0]) : exponential.of(x.v[0]);
    store_tail(out + i, x, n);
  }
}

}  // namespace CONSPO_ISA

// In the order of `Element`.
const RowKernels CONSPO_KERNELS[ELEMENTS] = {
    {CONSPO_ISA::statistics<float>, CONSPO_ISA::gradient<float>, CONSPO_ISA::narrow_gradient<BFloat16>,
     CONSPO_ISA::narrow_gradient<Half>, CONSPO_ISA::exp_each<float>},
    {CONSPO_ISA::statistics<double>, CONSPO_ISA::gradient<double>, nullptr, nullptr, CONSPO_ISA::exp_each<double>},
    {CONSPO_ISA::statistics<BFloat16>, CONSPO_ISA::gradient<BFloat16>, nullptr, nullptr, nullptr},
    {CONSPO_ISA::statistics<Half>, CONSPO_ISA::gradient<Half>, nullptr, nullptr, nullptr},
};

}  // namespace conspo
