// Of every tool; VQKV_TOOL_MAIN is its function, VQKV_TOOL_DEVICE what of it runs on a device, where that is linked.
#include "common/tools.h"
#ifdef VQKV_TOOL_DEVICE
#include "generation/device_forms.h"
#endif

int main(int argc, char** argv) {
#ifdef VQKV_TOOL_DEVICE
  return vqkv::VQKV_TOOL_MAIN(argc, argv, {}, &vqkv::VQKV_TOOL_DEVICE());
#else
  return vqkv::VQKV_TOOL_MAIN(argc, argv);
#endif
}
