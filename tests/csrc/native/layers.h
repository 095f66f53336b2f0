// The kernels of linear layers and of MLPs, over random shapes.
#pragma once

#include "inputs.h"

namespace gem_fast::native {

void run_layers(Random& random);

}  // namespace gem_fast::native
