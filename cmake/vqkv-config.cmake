# The layers are static libraries, so a consumer needs what they link.
include(${CMAKE_CURRENT_LIST_DIR}/VqkvDependencies.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/vqkv-targets.cmake)
