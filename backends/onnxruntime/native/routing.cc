#include "routing.h"

#include <cstring>

namespace moeify {
namespace {

bool finite(const float* values, size_t count) {
  bool all_finite = true;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    all_finite &= (bits & 0x7f800000u) != 0x7f800000u;
  }
  return all_finite;
}

// Calls visit(expert, token, weight) for each slot that needs a row, tokens in order.
template <class Visit>
void each_slot(const Choices& choices, size_t first, size_t last, Visit visit) {
  for (size_t t = first; t < last; ++t) {
    const int64_t* experts = choices.experts + t * choices.k;
    const float* weights = choices.weights + t * choices.k;
    int usable = -1;  // whether the token's row is finite; not known yet
    for (size_t i = 0; i < choices.k; ++i) {
      if (weights[i] == 0.0f) {
        if (usable < 0) usable = finite(choices.x + t * choices.width, choices.width);
        if (usable == 1) continue;
      }
      visit(size_t(experts[i]), uint32_t(t - first), weights[i]);
    }
  }
}

}  // namespace

std::string check(const Choices& choices, size_t experts) {
  const size_t slots = choices.tokens * choices.k;
  for (size_t i = 0; i < slots; ++i) {
    if (uint64_t(choices.experts[i]) < experts) continue;  // a negative index is a large unsigned one
    return "experts: index " + std::to_string(choices.experts[i]) + " at [" + std::to_string(i / choices.k) + ", " +
           std::to_string(i % choices.k) + "] is outside 0 to " + std::to_string(experts - 1);
  }
  return "";
}

void sort(const Choices& choices, size_t experts, size_t first, size_t last, Sorted& sorted) {
  std::memset(sorted.starts, 0, (experts + 1) * sizeof *sorted.starts);
  uint32_t* next = sorted.starts + 1;  // counts, then ends of what is placed so far
  each_slot(choices, first, last, [&](size_t expert, uint32_t, float) { ++next[expert]; });
  uint32_t sum = 0;
  for (size_t e = 0; e < experts; ++e) {
    const uint32_t count = next[e];
    next[e] = sum;
    sum += count;
  }
  each_slot(choices, first, last, [&](size_t expert, uint32_t token, float weight) {
    const uint32_t row = next[expert]++;
    sorted.tokens[row] = token;
    sorted.weights[row] = weight;
  });
}

}  // namespace moeify
