# vqkv_kernels(LAYER files...): kernel files (*.cu) and what launches them (*_device.cpp) for devices, the library
#   vqkv_LAYER_cuda where there is a CUDA compiler. Local memory and spilled registers are errors.
function(vqkv_kernels layer)
  if(NOT VQKV_HAS_CUDA)
    return()
  endif()
  add_library(vqkv_${layer}_cuda STATIC ${ARGN})
  target_link_libraries(vqkv_${layer}_cuda PUBLIC vqkv_options PRIVATE vqkv_core ${CMAKE_DL_LIBS} fmt::fmt)
  target_include_directories(vqkv_${layer}_cuda PUBLIC ${PROJECT_SOURCE_DIR}/lib ${PROJECT_BINARY_DIR}/generated)
  target_compile_options(vqkv_${layer}_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-O3;-lineinfo;--expt-relaxed-constexpr;-Xptxas=-warn-lmem-usage,-warn-spills,-Werror>)
  set_target_properties(vqkv_${layer}_cuda PROPERTIES UNITY_BUILD OFF)
endfunction()

# vqkv_emulated_kernels(NAME files.cu...): an object library of kernel files for the emulated device (lib/device/emulator.h).
#   They alone are instrumented, and lib/device/hooks.cpp takes the calls; with VQKV_SANITIZE=address the sanitizers take
#   them. With VQKV_SANITIZE=thread there is none: two owners of one symbol.
function(vqkv_emulated_kernels name)
  set(units)
  foreach(file IN LISTS ARGN)
    get_filename_component(path ${file} ABSOLUTE)
    get_filename_component(stem ${file} NAME_WE)
    # One file can't be compiled in two languages.
    set(unit ${CMAKE_CURRENT_BINARY_DIR}/${name}/${stem}.emulated.cpp)
    file(CONFIGURE OUTPUT ${unit} CONTENT "#include \"${path}\"\n" @ONLY)
    list(APPEND units ${unit})
  endforeach()
  add_library(${name} OBJECT ${units})
  set_target_properties(${name} PROPERTIES UNITY_BUILD OFF)
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE vqkv_device)
  target_compile_options(${name} PRIVATE -O1 -g1 -gdwarf-4 -Wno-unknown-pragmas)   # 4: addr2line 2.40 takes one file of 5 for another
  if(NOT VQKV_SANITIZE)
    target_compile_options(${name} PRIVATE -fsanitize=thread --param=tsan-instrument-func-entry-exit=0
                                           -fsanitize=alignment,bounds,shift)
  endif()
endfunction()
