// What a solve or a projection reports; the values are part of the Python interface (gem_fast.Status).
#pragma once

#include <cstdint>

namespace gem_fast {

enum Status : int32_t {
  kSolved = 0,      // the KKT conditions hold to kAcceptedResidual
  kInaccurate = 1,  // they do not: P is not positive semidefinite, the problem is unbounded below, or a projection
                    // needs more digits than its products have
  kNonFinite = 2,   // P or q has a NaN or an infinity; nothing was solved and v is zero
};

}  // namespace gem_fast
