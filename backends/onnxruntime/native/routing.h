// Which copies of which tokens go to which expert: a counting sort, stable, so that rows of an expert are in the order
// of their tokens and a result is the same in every run.
#pragma once

#include <string>

#include "kernels.h"

namespace moeify {

struct Choices {
  const float* x;          // [tokens][width]
  const int64_t* experts;  // [tokens][k]
  const float* weights;    // [tokens][k]
  size_t tokens;
  size_t width;
  size_t k;
};

// Rows sorted by expert; memory is the caller's.
struct Sorted {
  uint32_t* starts;   // [experts + 1]: where the rows of each expert begin
  uint32_t* tokens;   // [rows], counted from the first token of the window
  float* weights;     // [rows]
};

// "" or what is wrong with the first index outside [0, experts).
std::string check(const Choices& choices, size_t experts);

// Sorts the slots of the tokens `first` to `last`. A slot of weight 0 gets no row, unless its token holds infinity or
// NaN, which times 0 is NaN.
void sort(const Choices& choices, size_t experts, size_t first, size_t last, Sorted& sorted);

}  // namespace moeify
