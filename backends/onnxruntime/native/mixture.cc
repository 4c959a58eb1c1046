// Two products with one barrier between them, over a window of tokens at a time:
//
//   sort        the window's slots by expert
//   hidden      up (and gate), bias, activation: shares are runs of panels of equal cost      -> hidden [rows][F]
//   results     down: a share owns some columns of the result, adds every expert's rows to them in the order of experts
//               and copies them to y. No two threads write one value and the order of the sum is fixed: the result
//               does not depend on the number of threads.
//
// The weights are read once a window, in order. The window is so large that reading them costs little beside computing
// with them, and no larger, so that memory does not grow with the number of tokens and the hidden values stay in the
// last-level cache.
#include "mixture.h"

#include <algorithm>

#include "schedule.h"

namespace moeify {
namespace {

constexpr size_t kFewestTokens = 512;   // of a window
constexpr size_t kMostTokens = 4096;
constexpr size_t kRowsPerExpert = 128;  // of a window, on average

// Of a run: panels of one expert that a share adds to its results, one after another.
constexpr size_t kRunBytes = 32 << 10;      // short runs of memory are read slowly
constexpr size_t kRunPanels = 4;            // the hidden values are read once a run: runs of one read them often
constexpr size_t kMostRunBytes = 128 << 10;  // such a run stays in a small second-level cache while rows pass it
constexpr size_t kResultBytes = 128 << 10;  // and so do the results that it is added to

constexpr size_t rounded(size_t value, size_t to) { return (value + to - 1) / to * to; }

size_t window_tokens(const Mixture& m) {
  const size_t wanted = kRowsPerExpert * m.experts / m.choices.k;
  return std::min(m.choices.tokens, std::clamp(wanted, kFewestTokens, kMostTokens));
}

// Values from row to row of the hidden values. Rows that lie a multiple of 2 KiB apart share few sets of the
// first-level cache; a line more between them spreads them.
size_t hidden_stride(size_t width) {
  const size_t padded = panel_count(width) * kColumns;
  return padded % 512 == 0 ? padded + kColumns : padded;
}

// One block of memory for everything a window needs.
struct Workspace {
  Sorted sorted;
  Group* groups;
  float* hidden;
  float* results;  // [panels of down][tokens][16]

  // From the address `memory` on; returns the bytes, which do not depend on it.
  size_t place(uintptr_t memory, const Mixture& m, size_t tokens) {
    const size_t rows = tokens * m.choices.k;
    size_t bytes = 0;
    const auto take = [&](auto*& pointer, size_t count) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(memory + bytes);
      bytes += rounded(count * sizeof *pointer, kLine);
    };
    take(sorted.starts, m.experts + 1);
    take(sorted.tokens, rows);
    take(sorted.weights, rows);
    take(groups, most_groups(m.experts, rows));
    take(hidden, rows * hidden_stride(m.up.width));
    take(results, m.down.count() * tokens * kColumns);
    return bytes;
  }
};

// One group's rows times panels of one matrix, by register tiles. What all of them share is worked out once.
class Tiles {
 public:
  Tiles(const Kernels& kernels, const Mixture& m, const Matrix& matrix, const Group& group)
      : matrix_(matrix),
        group_(group),
        product_(kernels.product[size_t(m.storage)]),
        count_((group.rows() + kernels.rows - 1) / kernels.rows),
        part_(matrix.panel_bytes / count_) {
    p_.depth = matrix.depth;
    p_.block = m.block == 0 ? matrix.depth : m.block;
    p_.stride = part_ / matrix.depth;
    p_.panels = 1;
    p_.panel_bytes = matrix.panel_bytes;
    p_.scales_step = matrix.blocks * kColumns;
  }

  size_t count() const { return count_; }

  // As few tiles as the rows fit into, as even as they go.
  size_t first_row(size_t tile) const { return group_.first + group_.rows() * tile / count_; }

  // Tile by tile: p.rows, and p.sums or p.results, are the caller's; p.panels is 1 unless the caller sets it.
  Product& operands() { return p_; }

  // One tile of `rows` rows times p.panels panels, while its part of `next`, the panels that come next, is fetched.
  void multiply(size_t panel, size_t tile, size_t rows, const char* next) {
    p_.panel = matrix_.panel(group_.expert, panel);
    p_.scales = matrix_.panel_scales(group_.expert, panel);
    p_.ahead = next + part_ * tile;
    product_[rows](p_);
  }

 private:
  const Matrix& matrix_;
  const Group& group_;
  void (*const* product_)(const Product&);
  const size_t count_;
  const size_t part_;  // bytes of a panel that one tile fetches
  Product p_ = {};
};

// The state of one window, shared by the threads.
class Window {
 public:
  Window(const Mixture& mixture, const Kernels& kernels, const Workspace& space, size_t first, size_t tokens)
      : m_(mixture),
        kernels_(kernels),
        space_(space),
        first_(first),
        tokens_(tokens),
        groups_(make_groups(space.sorted.starts, mixture.experts, space.groups)),
        schedule_(space.groups, groups_, mixture.up.count(), mixture.up.depth * (mixture.gate.panels ? 2 : 1)),
        stride_(hidden_stride(mixture.up.width)) {}

  // False where the host has no threads for it.
  bool run(Host& host) {
    if (groups_ != 0 && !share_out(host, schedule_.shares, &Window::hidden_share)) return false;
    return share_out(host, result_shares(), &Window::result_share);
  }

 private:
  // Fewer than two shares stay on this thread.
  bool share_out(Host& host, size_t shares, void (Window::*task)(size_t)) {
    if (shares == 1) {
      (this->*task)(0);
      return true;
    }
    struct Bound {
      Window* window;
      void (Window::*task)(size_t);
    } bound{this, task};
    return host.parallel(
        shares,
        [](void* data, size_t share) {
          const Bound& b = *static_cast<Bound*>(data);
          (b.window->*b.task)(share);
        },
        &bound);
  }

  void hidden_share(size_t share) {
    for (size_t g = 0; g < groups_; ++g) {
      const size_t first = schedule_.first_panel(space_.groups[g], share);
      const size_t last = schedule_.first_panel(space_.groups[g], share + 1);
      if (first < last) hidden_panels(g, first, last);
    }
  }

  void hidden_panels(size_t g, size_t first, size_t last) {
    const Group& group = space_.groups[g];
    const bool gated = m_.gate.panels != nullptr;
    Tiles up(kernels_, m_, m_.up, group), gate(kernels_, m_, gated ? m_.gate : m_.up, group);
    alignas(kLine) float up_sums[kMostRows * kColumns], gate_sums[kMostRows * kColumns];
    alignas(kLine) float up_spare[kColumns], gate_spare[kColumns];
    const float* rows[kMostRows];
    up.operands().rows = gate.operands().rows = rows;
    up.operands().sums = up_sums;
    gate.operands().sums = gate_sums;
    Hidden h;
    h.up = up_sums;
    h.gate = gated ? gate_sums : nullptr;
    h.activation = m_.activation;
    h.stride = stride_;
    for (size_t panel = first; panel < last; ++panel) {
      h.up_bias = m_.up.panel_bias(group.expert, panel, up_spare);
      if (gated) h.gate_bias = m_.gate.panel_bias(group.expert, panel, gate_spare);
      for (size_t tile = 0; tile < up.count(); ++tile) {
        const size_t from = up.first_row(tile);
        h.count = up.first_row(tile + 1) - from;
        for (size_t i = 0; i < h.count; ++i) {
          rows[i] = m_.choices.x + (first_ + space_.sorted.tokens[from + i]) * m_.choices.width;
        }
        up.multiply(panel, tile, h.count, next_panel(m_.up, g, panel));
        if (gated) gate.multiply(panel, tile, h.count, next_panel(m_.gate, g, panel));
        h.out = space_.hidden + from * stride_ + panel * kColumns;
        kernels_.hidden(h);
      }
    }
  }

  // The panel that is read after this one, or this one again after the last.
  const char* next_panel(const Matrix& matrix, size_t g, size_t panel) const {
    if (panel + 1 < matrix.count()) return matrix.panel(space_.groups[g].expert, panel + 1);
    if (g + 1 < groups_) return matrix.panel(space_.groups[g + 1].expert, 0);
    return matrix.panel(space_.groups[g].expert, panel);
  }

  // How many panels of results a share owns: the experts' panels are read one run after another.
  size_t run_of_panels() const {
    const size_t bytes = m_.down.panel_bytes;
    const size_t long_enough = std::max(kRunBytes / bytes, std::min(kRunPanels, kMostRunBytes / bytes));
    const size_t fits = kResultBytes / (tokens_ * kColumns * sizeof(float));
    return std::max<size_t>(std::min(long_enough, fits), 1);
  }

  size_t result_shares() const {
    const size_t panels = m_.down.count();
    const size_t most = (panels + run_of_panels() - 1) / run_of_panels();
    uint64_t rows = 0;
    for (size_t g = 0; g < groups_; ++g) rows += space_.groups[g].cost();
    return size_t(std::clamp<uint64_t>(rows * panels * m_.down.depth * kColumns / kShareProducts, 1, most));
  }

  void result_share(size_t share) {
    const size_t panels = m_.down.count(), shares = result_shares();
    const size_t first = panels * share / shares, last = panels * (share + 1) / shares;
    std::fill(results(first), results(last), 0.0f);
    for (size_t g = 0; g < groups_; ++g) add_group(g, first, last);
    for (size_t t = 0; t < tokens_; ++t) {
      for (size_t panel = first; panel < last; ++panel) {
        const size_t column = panel * kColumns, width = std::min(kColumns, m_.down.width - column);
        std::copy_n(results(panel) + t * kColumns, width, m_.y + (first_ + t) * m_.down.width + column);
      }
    }
  }

  float* results(size_t panel) const { return space_.results + panel * tokens_ * kColumns; }

  // Adds a group's rows to the panels `first` to `last` of the results.
  void add_group(size_t g, size_t first, size_t last) {
    const Group& group = space_.groups[g];
    const Group& next = space_.groups[g + 1 < groups_ ? g + 1 : g];
    Tiles down(kernels_, m_, m_.down, group);
    alignas(kLine) float sums[kMostRows * kColumns], spare[kColumns];
    const float* rows[kMostRows];
    Product& p = down.operands();
    p.rows = rows;
    p.sums = sums;
    p.results_step = tokens_ * kColumns;
    for (size_t tile = 0; tile < down.count(); ++tile) {
      const size_t from = down.first_row(tile), count = down.first_row(tile + 1) - from;
      for (size_t i = 0; i < count; ++i) rows[i] = space_.hidden + (from + i) * stride_;
      p.weights = space_.sorted.weights + from;
      p.tokens = space_.sorted.tokens + from;
      for (size_t panel = first; panel < last; panel += p.panels) {
        p.bias = m_.down.panel_bias(group.expert, panel, spare);
        p.bias_step = p.bias == spare ? 0 : kColumns;
        p.panels = std::min(last, m_.down.bias_end(panel)) - panel;
        p.results = results(panel);
        down.multiply(panel, tile, count, m_.down.panel(next.expert, panel));
      }
    }
  }

  const Mixture& m_;
  const Kernels& kernels_;
  const Workspace& space_;
  const size_t first_, tokens_;
  const size_t groups_;
  const Schedule schedule_;
  const size_t stride_;
};

}  // namespace

std::string run(const Mixture& mixture, const Kernels& kernels, Host& host) {
  std::string problem = check(mixture.choices, mixture.experts);
  if (!problem.empty() || mixture.choices.tokens == 0) return problem;
  const size_t window = window_tokens(mixture);
  Workspace space;
  const size_t bytes = space.place(0, mixture, window) + kLine;
  void* const memory = host.allocate(bytes);
  if (memory == nullptr) return "x: no memory for " + std::to_string(bytes) + " bytes of hidden values";
  space.place(rounded(reinterpret_cast<uintptr_t>(memory), kLine), mixture, window);
  for (size_t first = 0; first < mixture.choices.tokens; first += window) {
    const size_t tokens = std::min(window, mixture.choices.tokens - first);
    sort(mixture.choices, mixture.experts, first, first + tokens, space.sorted);
    if (!Window(mixture, kernels, space, first, tokens).run(host)) {
      host.release(memory);
      return "x: the threads of the host took no work";
    }
  }
  host.release(memory);
  return "";
}

}  // namespace moeify
