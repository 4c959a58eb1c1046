// How the work of the first product is shared out: in runs of panels of equal cost, whatever the experts' loads are.
//
// A group is some rows of one expert, and costs for each of its panels as many rows as it has, plus what reading the
// panel costs. Panels of all groups lie on one line by cost; a share is an interval of it and gets the panels that
// begin there. Threads take shares as they become free, so more shares than threads even out what the cost leaves out.
#pragma once

#include "kernels.h"

namespace moeify {

constexpr size_t kMostGroupRows = 96;  // rows of 768 values, 288 KiB, stay in a second-level cache of 512
constexpr size_t kPanelRows = 4;       // what reading a panel from memory costs, in rows
constexpr size_t kMostShares = 192;    // a multiple of most numbers of cores
constexpr size_t kShareProducts = 1 << 16;  // multiply-adds worth handing to another thread: two microseconds

struct Group {
  uint32_t expert;
  uint32_t first, last;  // sorted rows, `last` not included
  uint64_t before;       // cost of one panel of each earlier group

  size_t rows() const { return last - first; }
  uint64_t cost() const { return rows() + kPanelRows; }
};

// Upper bound of the number of groups.
constexpr size_t most_groups(size_t experts, size_t rows) { return experts + rows / kMostGroupRows; }

// Fills `groups` from the sorted rows; returns how many there are. An expert's rows are cut as evenly as they go.
size_t make_groups(const uint32_t* starts, size_t experts, Group* groups);

struct Schedule {
  const Group* groups;
  size_t count;
  size_t panels;  // of each group
  size_t shares;

  Schedule(const Group* groups, size_t count, size_t panels, size_t depth);

  // The first panel of the group that begins in this share or a later one; `panels` if there is none.
  size_t first_panel(const Group& group, size_t share) const;

 private:
  uint64_t total_;
};

}  // namespace moeify
