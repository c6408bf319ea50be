// The mask update of a layer (SPEC 4), on the bits of its numbers.
//
// The magnitudes of floats are ordered as their bits without the sign, so that one kernel serves
// all types of a size. A selection finds the smallest chosen magnitude, eight bits at a time:
// `count_digits` counts the next digit of the candidates that agree with all digits so far, and its
// last block takes the digit of the last chosen candidate. Candidates with exactly that magnitude
// are ties, and are chosen in index order: `count_ties` counts them in each row, its last block sets
// how many each row may choose, and `mark_largest` marks. Selections within rows use a block for
// each row.
//
// Nothing waits for the host. Counts use integer atomics, whose order does not matter. One launch
// serves one selection or two, whose scores and candidates are `first` and `second`: in a grid
// (blocks, selections), or in turns.
//   first, second  (n_out, n_in)  bits of weights or gradients
//   mask           (n_out, n_in)  bool
//   marks          (n_out, n_in)  uint8, bits of `Mark`
//   survives       (n_out)        bool
//   selections     (selections)   {magnitude so far, candidates that remain to be chosen}
//   histograms     (selections, 256), ties (selections, n_out)
//   arrived        (selections)   blocks that have come to their end; 0 before and after a launch
//   not_finite     (selections)   scores that are NaN or infinite, where the mask is true if the
//                                 candidates are the active ones
// Blocks of 256 threads, rows in a grid-stride loop.

enum Mark { kByMagnitude = 1, kByGradient = 2, kKept = 4, kGrown = 8 };

enum Candidates { kActive, kInactive, kAll, kSurviving };

constexpr int kThreads = 256, kDigits = 256, kDigitBits = 8;
using Wide = unsigned long long;
using Byte = unsigned char;

template <class U>
__device__ __forceinline__ U magnitude(U bits) {
  return static_cast<U>(bits & static_cast<U>(static_cast<U>(~U(0)) >> 1));
}

__device__ __forceinline__ bool is_candidate(int candidates, bool active, bool survives,
                                             bool nonzero) {
  switch (candidates) {
    case kActive:
      return active;
    case kInactive:
      return !active;
    case kAll:
      return true;
    default:
      return active && survives && nonzero;
  }
}

struct Selection {
  Wide last, missing;
};

// Whether all other blocks along the grid's first axis have come here before. All threads call this.
// What the other blocks have written is then read from the second-level cache, by __ldcg.
__device__ __forceinline__ bool is_last_block(unsigned int* arrived) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
    if (is_last) *arrived = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// totals += {active weights, active weights that are not zero}. From these follow the counts of
// SPEC 4.2: the weights to keep, those to prune, and again those to keep, for three selections.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    count_weights(const U* __restrict__ bits, const Byte* __restrict__ mask, long long n,
                  double drop_fraction, Wide* totals, unsigned int* arrived,
                  Selection* selections) {
  const long long stride = static_cast<long long>(gridDim.x) * kThreads;
  Wide active = 0, nonzero = 0;
  for (long long start = static_cast<long long>(blockIdx.x) * kThreads; start < n;
       start += stride) {
    const long long i = start + threadIdx.x;
    const bool counts = i < n && mask[i];
    active += __syncthreads_count(counts);
    nonzero += __syncthreads_count(counts && magnitude(bits[i]) != 0);
  }
  if (threadIdx.x == 0) {
    atomicAdd(totals, active);
    atomicAdd(totals + 1, nonzero);
  }
  if (!is_last_block(arrived) || threadIdx.x > 0) return;
  const Wide n_active = __ldcg(totals), n_nonzero = __ldcg(totals + 1);
  const Wide rest = n_active - static_cast<Wide>(floor(n_active * drop_fraction));
  const Wide n_keep = rest < n_nonzero ? rest : n_nonzero;
  selections[0] = {0, n_keep};
  selections[1] = {0, n_active - n_keep};
  selections[2] = {0, n_keep};
}

// The digit of the last of the `missing` largest candidates, and how many of these have it. All
// threads of the block call this, each with the count of its digit.
__device__ __forceinline__ void choose(Wide count, Wide missing, Wide* sums, Wide* digit,
                                       Wide* left) {
  const int mine = threadIdx.x;
  sums[mine] = count;
  __syncthreads();
  // Each thread sums the counts from its digit to the largest.
  for (int distance = 1; distance < kDigits; distance *= 2) {
    const Wide further = mine + distance < kDigits ? sums[mine + distance] : 0;
    __syncthreads();
    sums[mine] += further;
    __syncthreads();
  }
  // Choose at most all candidates. For none, the digit is the largest: no magnitude exceeds it.
  if (missing > sums[0]) missing = sums[0];
  const Wide above = sums[mine] - count;
  if (missing == 0 ? mine == kDigits - 1 : above < missing && missing <= sums[mine]) {
    *digit = mine;
    *left = missing == 0 ? 0 : missing - above;
  }
  __syncthreads();
}

// histogram += the number of candidates with each next digit. Bits above `shift` + 8 are known. The
// last block appends the chosen digit to the selection, and clears the histogram. For the first
// digit, not_finite += scores with all bits of infinity.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    count_digits(const U* __restrict__ first, const U* __restrict__ second,
                 const Byte* __restrict__ mask, const Byte* __restrict__ survives, long long n_out,
                 long long n_in, int first_candidates, int second_candidates, U first_infinity,
                 U second_infinity, int shift, Selection* selections, Wide* histograms,
                 Wide* not_finite, unsigned int* arrived) {
  __shared__ unsigned int counts[kDigits], wrong;
  __shared__ Wide sums[kDigits], digit, left;
  constexpr int width = 8 * static_cast<int>(sizeof(U));
  const U* __restrict__ bits = blockIdx.y ? second : first;
  const int candidates = blockIdx.y ? second_candidates : first_candidates;
  const U infinity = blockIdx.y ? second_infinity : first_infinity;
  const bool is_first = shift + kDigitBits == width;
  Wide* histogram = histograms + blockIdx.y * kDigits;
  Selection* selection = selections + blockIdx.y;
  const Wide so_far = selection->last, missing = selection->missing;
  counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) wrong = 0;
  __syncthreads();
  for (long long row = blockIdx.x; row < n_out; row += gridDim.x) {
    for (long long i = row * n_in + threadIdx.x; i < (row + 1) * n_in; i += kThreads) {
      const Wide size = magnitude(bits[i]);
      if (is_first && size >= infinity && (candidates != kActive || mask[i])) atomicAdd(&wrong, 1u);
      if (!is_candidate(candidates, mask[i], survives[row], size != 0)) continue;
      if (!is_first && size >> (shift + kDigitBits) != so_far) continue;
      atomicAdd(counts + (size >> shift & (kDigits - 1)), 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && wrong) atomicAdd(not_finite + blockIdx.y, static_cast<Wide>(wrong));
  const unsigned int count = counts[threadIdx.x];
  if (count) atomicAdd(histogram + threadIdx.x, static_cast<Wide>(count));
  if (!is_last_block(arrived + blockIdx.y)) return;
  choose(__ldcg(histogram + threadIdx.x), missing, sums, &digit, &left);
  histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) *selection = {so_far << kDigitBits | digit, left};
}

// ties[row] = number of its ties that a row may choose; the first rows come first. All threads of a
// block call this. Before, ties[row] is the number of ties in the row.
__device__ __forceinline__ void share_ties(long long* ties, long long n_out, long long missing) {
  __shared__ long long sums[kThreads];
  for (long long start = 0; start < n_out; start += kThreads) {
    const long long row = start + threadIdx.x, mine = row < n_out ? __ldcg(ties + row) : 0;
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int distance = 1; distance < kThreads; distance *= 2) {
      const long long before =
          static_cast<int>(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
      __syncthreads();
      sums[threadIdx.x] += before;
      __syncthreads();
    }
    const long long left = missing - (sums[threadIdx.x] - mine);
    if (row < n_out) ties[row] = left < 0 ? 0 : left < mine ? left : mine;
    missing -= sums[kThreads - 1];
    if (missing < 0) missing = 0;
    __syncthreads();
  }
}

// ties[row] = number of candidates with the selection's magnitude that the row may choose.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    count_ties(const U* __restrict__ first, const U* __restrict__ second,
               const Byte* __restrict__ mask, const Byte* __restrict__ survives, long long n_out,
               long long n_in, int first_candidates, int second_candidates,
               const Selection* __restrict__ selections, long long* all_ties,
               unsigned int* arrived) {
  const U* __restrict__ bits = blockIdx.y ? second : first;
  const int candidates = blockIdx.y ? second_candidates : first_candidates;
  const Selection selection = selections[blockIdx.y];
  long long* ties = all_ties + blockIdx.y * n_out;
  for (long long row = blockIdx.x; row < n_out; row += gridDim.x) {
    long long count = 0;
    for (long long start = 0; start < n_in; start += kThreads) {
      const long long column = start + threadIdx.x, i = row * n_in + column;
      bool is_tie = false;
      if (column < n_in) {
        const Wide size = magnitude(bits[i]);
        is_tie = size == selection.last && is_candidate(candidates, mask[i], survives[row], size != 0);
      }
      count += __syncthreads_count(is_tie);
    }
    if (threadIdx.x == 0) ties[row] = count;
  }
  if (is_last_block(arrived + blockIdx.y))
    share_ties(ties, n_out, static_cast<long long>(selection.missing));
}

// The number of ties in threads of the block before this one, and in all of its threads.
__device__ __forceinline__ int ties_before(bool is_tie, int* warp_ties, int* all) {
  const unsigned int votes = __ballot_sync(0xffffffffu, is_tie);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) warp_ties[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warp_ties[i];
    total += warp_ties[i];
  }
  __syncthreads();
  *all = total;
  return before;
}

// marks |= first_mark, or twice that for the second selection, where a candidate is chosen;
// counts[row] = number of positions with any of the marks `counted`.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    mark_largest(const U* __restrict__ first, const U* __restrict__ second,
                 const Byte* __restrict__ mask, const Byte* __restrict__ survives, long long n_out,
                 long long n_in, int first_candidates, int second_candidates, int n_selections,
                 const Selection* __restrict__ selections, const long long* __restrict__ ties,
                 int first_mark, int counted, Byte* marks, long long* counts) {
  __shared__ int warp_ties[kThreads / 32];
  for (long long row = blockIdx.x; row < n_out; row += gridDim.x) {
    long long count = 0;
    for (int s = 0; s < n_selections; ++s) {
      const U* __restrict__ bits = s ? second : first;
      const int candidates = s ? second_candidates : first_candidates, mark = first_mark << s;
      const Wide last = selections[s].last;
      const long long own_ties = ties[s * n_out + row];
      long long seen = 0;
      count = 0;
      for (long long start = 0; start < n_in; start += kThreads) {
        const long long column = start + threadIdx.x, i = row * n_in + column;
        Wide size = 0;
        bool counts_here = false;
        if (column < n_in) {
          size = magnitude(bits[i]);
          counts_here = is_candidate(candidates, mask[i], survives[row], size != 0);
        }
        const bool is_tie = counts_here && size == last;
        int all;
        const int before = ties_before(is_tie, warp_ties, &all);
        const bool chosen = counts_here && (size > last || (is_tie && seen + before < own_ties));
        seen += all;
        int now = column < n_in ? marks[i] : 0;
        if (chosen) marks[i] = static_cast<Byte>(now |= mark);
        count += __syncthreads_count(now & counted);
      }
    }
    if (threadIdx.x == 0) counts[row] = count;
  }
}

// A block for each surviving row. With `grows`, mark positions that are not kept as grown, until
// the row has `fan_in`. Without, keep only the `fan_in` largest of the kept positions.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    fill_rows(const U* __restrict__ bits, const Byte* __restrict__ survives, long long n_out,
              long long n_in, long long fan_in, int grows, const long long* __restrict__ kept,
              Byte* marks) {
  __shared__ Wide sums[kDigits], digit, left;
  __shared__ unsigned int counts[kDigits];
  __shared__ int warp_ties[kThreads / 32];
  constexpr int width = 8 * static_cast<int>(sizeof(U));
  for (long long row = blockIdx.x; row < n_out; row += gridDim.x) {
    if (!survives[row] || (!grows && kept[row] <= fan_in)) continue;
    const long long has = kept[row] < fan_in ? kept[row] : fan_in;
    Wide last = 0, missing = static_cast<Wide>(grows ? fan_in - has : fan_in);
    for (int shift = width - kDigitBits; shift >= 0; shift -= kDigitBits) {
      counts[threadIdx.x] = 0;
      __syncthreads();
      for (long long i = row * n_in + threadIdx.x; i < (row + 1) * n_in; i += kThreads) {
        if (((marks[i] & kKept) != 0) == (grows != 0)) continue;
        const Wide size = magnitude(bits[i]);
        if (shift + kDigitBits < width && size >> (shift + kDigitBits) != last) continue;
        atomicAdd(counts + (size >> shift & (kDigits - 1)), 1u);
      }
      __syncthreads();
      choose(counts[threadIdx.x], missing, sums, &digit, &left);
      last = last << kDigitBits | digit;
      missing = left;
      __syncthreads();
    }
    long long seen = 0;
    for (long long start = 0; start < n_in; start += kThreads) {
      const long long column = start + threadIdx.x, i = row * n_in + column;
      const bool counts_here =
          column < n_in && ((marks[i] & kKept) != 0) != (grows != 0);
      const Wide size = counts_here ? magnitude(bits[i]) : 0;
      const bool is_tie = counts_here && size == last;
      int all;
      const long long before = seen + ties_before(is_tie, warp_ties, &all);
      const bool chosen =
          counts_here && (size > last || (is_tie && before < static_cast<long long>(missing)));
      seen += all;
      if (grows && chosen) marks[i] = static_cast<Byte>(marks[i] | kGrown);
      if (!grows && counts_here && !chosen) marks[i] = static_cast<Byte>(marks[i] & ~kKept);
    }
    __syncthreads();
  }
}

// The new mask and weight; totals += {active before and not after, after and not before}.
template <class U>
__global__ void __launch_bounds__(kThreads, 4)
    remap_weight(const U* __restrict__ bits, const Byte* __restrict__ mask,
                 const Byte* __restrict__ marks, long long n_out, long long n_in, U grown_init,
                 Byte* new_mask, U* new_bits, Byte* was_active, Wide* totals) {
  Wide pruned = 0, grown = 0;
  for (long long row = blockIdx.x; row < n_out; row += gridDim.x) {
    bool active = false;
    for (long long start = 0; start < n_in; start += kThreads) {
      const long long column = start + threadIdx.x, i = row * n_in + column;
      bool before = false, after = false;
      if (column < n_in) {
        before = mask[i];
        after = marks[i] & (kKept | kGrown);
        new_mask[i] = after;
        new_bits[i] = !after ? U(0) : before ? bits[i] : grown_init;
      }
      pruned += __syncthreads_count(before && !after);
      grown += __syncthreads_count(after && !before);
      active |= __syncthreads_or(before) != 0;
    }
    if (threadIdx.x == 0) was_active[row] = active;
  }
  if (threadIdx.x > 0) return;
  atomicAdd(totals, pruned);
  atomicAdd(totals + 1, grown);
}
