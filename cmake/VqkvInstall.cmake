# `cmake --install` gives a package: find_package(vqkv) then link vqkv::experiment or any lower layer, or
# vqkv::tools for the tools themselves.
get_property(layers GLOBAL PROPERTY VQKV_LAYERS)
install(TARGETS ${layers} vqkv_tools vqkv_options EXPORT vqkv-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT vqkv-targets NAMESPACE vqkv:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/vqkv)
install(DIRECTORY lib/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/vqkv FILES_MATCHING PATTERN "*.h" PATTERN "*.inc")
install(FILES apps/common/tools.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/vqkv/common)
include(CMakePackageConfigHelpers)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/vqkv-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES cmake/vqkv-config.cmake ${PROJECT_BINARY_DIR}/vqkv-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/vqkv)
install(FILES cmake/VqkvDependencies.cmake DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/vqkv)
