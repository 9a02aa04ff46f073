// The one header of a kernel file: CUDA's device language, and what of it the project wraps. nvcc compiles the file for
// a device (cuda.h), any other compiler for the emulator (emulation.h), which is stricter than a device.
#pragma once
#if defined(__CUDACC__)
#include "device/cuda.h"
#else
#include "device/emulation.h"
#endif
