// Small kernels, each with a fault that can be planted: what the emulator is for.
#pragma once
#include <string>
#include <vector>

namespace vqkv::device {

struct Mutant {
  std::string name;
  // Runs the kernel, sound or with its fault; what it computed, where that is all known.
  std::vector<float> (*run)(bool broken);
  // What is told of the fault: every part, of some fault. Empty: nothing is, the numbers are wrong.
  std::vector<std::string> told;
};

const std::vector<Mutant>& mutants();

// Four (8, 8) matrices that count up from 0, as the lanes of a warp hold them: (matrix, plain | transposed, lane, 2).
std::vector<float> matrices_of_shared_memory();

}  // namespace vqkv::device
