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
