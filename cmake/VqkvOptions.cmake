# One INTERFACE target carries language level, warnings and sanitizers to every target of the project.
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Units of x86-64 (cmake/VqkvLayer.cmake) stand beside portable code that does the same more slowly.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  option(VQKV_PORTABLE "Leave out what is compiled for x86-64 alone" OFF)
else()
  set(VQKV_PORTABLE ON)
  # Kernels keep arrays of vectors, which Highway's targets of unknown vector length can't be in.
  set(vqkv_highway_targets "HWY_DISABLED_TARGETS=(HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128|HWY_RVV)")
endif()

add_library(vqkv_options INTERFACE)
if(VQKV_PORTABLE)
  target_compile_definitions(vqkv_options INTERFACE VQKV_PORTABLE ${vqkv_highway_targets})  # core/cpu.h
endif()
target_compile_features(vqkv_options INTERFACE cxx_std_20)
# No -ffast-math and no contraction: the same bits on every path that claims to be exact.
# -Wrestrict fires on std::string concatenation in g++ 12 (GCC bug 105651).
target_compile_options(vqkv_options INTERFACE
  $<BUILD_INTERFACE:$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;$<$<CXX_COMPILER_ID:GNU>:-Wshadow=local>;-Wnon-virtual-dtor;$<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>;-ffp-contract=off>>)
if(CMAKE_UNITY_BUILD AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Fires on types of unnamed namespaces that are members in files which are included by what compiles them together.
  target_compile_options(vqkv_options INTERFACE $<BUILD_INTERFACE:$<$<COMPILE_LANGUAGE:CXX>:-Wno-subobject-linkage>>)
endif()
if(VQKV_WERROR)
  target_compile_options(vqkv_options INTERFACE $<BUILD_INTERFACE:$<$<COMPILE_LANGUAGE:C,CXX>:-Werror>>)
endif()
if(VQKV_SANITIZE STREQUAL "address")
  target_compile_options(vqkv_options INTERFACE $<BUILD_INTERFACE:-fsanitize=address,undefined;-fno-sanitize-recover=undefined;-fno-omit-frame-pointer>)
  target_link_options(vqkv_options INTERFACE -fsanitize=address,undefined)  # also whoever links the installed libraries
elseif(VQKV_SANITIZE STREQUAL "thread")
  target_compile_options(vqkv_options INTERFACE $<BUILD_INTERFACE:-fsanitize=thread;-fno-omit-frame-pointer>)
  target_link_options(vqkv_options INTERFACE -fsanitize=thread)
elseif(NOT VQKV_SANITIZE STREQUAL "")
  message(FATAL_ERROR "VQKV_SANITIZE is '${VQKV_SANITIZE}'; allowed: address, thread, or empty")
endif()
