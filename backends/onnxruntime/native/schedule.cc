#include "schedule.h"

#include <algorithm>

namespace moeify {

size_t make_groups(const uint32_t* starts, size_t experts, Group* groups) {
  size_t count = 0;
  uint64_t before = 0;
  for (size_t e = 0; e < experts; ++e) {
    const size_t rows = starts[e + 1] - starts[e];
    const size_t parts = (rows + kMostGroupRows - 1) / kMostGroupRows;
    for (size_t i = 0; i < parts; ++i) {
      Group& group = groups[count++];
      group.expert = uint32_t(e);
      group.first = uint32_t(starts[e] + rows * i / parts);
      group.last = uint32_t(starts[e] + rows * (i + 1) / parts);
      group.before = before;
      before += group.cost();
    }
  }
  return count;
}

Schedule::Schedule(const Group* groups, size_t count, size_t panels, size_t depth)
    : groups(groups), count(count), panels(panels) {
  const uint64_t rows = count == 0 ? 0 : groups[count - 1].before + groups[count - 1].cost();
  total_ = rows * panels;
  const uint64_t worth = total_ * depth * kColumns / kShareProducts;
  shares = size_t(std::clamp<uint64_t>(worth, 1, std::min(kMostShares, std::max<size_t>(count * panels, 1))));
}

size_t Schedule::first_panel(const Group& group, size_t share) const {
  const uint64_t from = total_ * share / shares;
  const uint64_t begin = group.before * panels;
  if (from <= begin) return 0;
  return size_t(std::min<uint64_t>((from - begin + group.cost() - 1) / group.cost(), panels));
}

}  // namespace moeify
