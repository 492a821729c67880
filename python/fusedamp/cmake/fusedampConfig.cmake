# The target fusedamp::fusedamp: fusedamp's headers, classes and op libraries, and torch. With CMake 3.18 or later:
#
#   find_package(fusedamp 0.1 REQUIRED CONFIG)
#   target_link_libraries(train PRIVATE fusedamp::fusedamp)
#
# torch is the target `torch`, if the program called find_package(Torch) before. Otherwise it is found in Torch_DIR,
# Torch_ROOT or CMAKE_PREFIX_PATH, or next to this package (site-packages/torch). This file does not call
# find_package(Torch), which stops with an error if torch has CUDA and the machine has no CUDA toolkit.

# Sets `result` to the folder of torch's wheel or of LibTorch; empty if there is none.
function(_fusedamp_find_torch package result)
  set(places "${Torch_DIR}")
  if(NOT Torch_DIR)
    set(places "$ENV{Torch_DIR}")
    file(TO_CMAKE_PATH "$ENV{Torch_ROOT}:$ENV{CMAKE_PREFIX_PATH}" environment)
    foreach(prefix IN LISTS Torch_ROOT CMAKE_PREFIX_PATH environment)
      list(APPEND places "${prefix}/Torch" "${prefix}/share/cmake/Torch" "${prefix}/torch/share/cmake/Torch")
    endforeach()
    list(APPEND places "${package}/../torch/share/cmake/Torch")
  endif()
  foreach(place IN LISTS places)
    if(EXISTS "${place}/TorchConfig.cmake")
      get_filename_component(folder "${place}/../../.." ABSOLUTE)
      set(${result} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

# Sets `version` to torch's version, and `standard` to the C++ standard that it needs, as its headers tell; empty if
# `folders` have no headers of torch.
function(_fusedamp_read_torch folders version standard)
  set(found "")
  set(cxx 17)
  foreach(folder IN LISTS folders)
    foreach(header "${folder}/torch/version.h" "${folder}/torch/headeronly/version.h") # the first until torch 2.9
      if(EXISTS "${header}")
        file(STRINGS "${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
        if("${lines}" MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
          set(found "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}")
        endif()
      endif()
    endforeach()
    if(EXISTS "${folder}/ATen/ATen.h")
      file(STRINGS "${folder}/ATen/ATen.h" lines REGEX "__cplusplus < 20[0-9][0-9]") # the least that ATen.h accepts
      if("${lines}" MATCHES "__cplusplus < 20([0-9][0-9])" AND CMAKE_MATCH_1 GREATER cxx)
        set(cxx "${CMAKE_MATCH_1}")
      endif()
    endif()
  endforeach()
  set(${version} "${found}" PARENT_SCOPE)
  set(${standard} "${cxx}" PARENT_SCOPE)
endfunction()

# Makes a static library of fusedamp's classes, which each program compiles for its own torch and C++ standard. `folders`
# are the headers'. The program's warnings and linters are not for these sources.
function(_fusedamp_add_classes headers folders standard)
  if(TARGET fusedamp_classes) # of an earlier call in another folder
    return()
  endif()
  file(GLOB sources "${headers}/fusedamp/source/*.cpp")
  add_library(fusedamp_classes STATIC EXCLUDE_FROM_ALL ${sources})
  target_include_directories(fusedamp_classes SYSTEM PRIVATE ${folders})
  target_compile_features(fusedamp_classes PRIVATE "cxx_std_${standard}")
  target_compile_options(fusedamp_classes PRIVATE -w)
  set_target_properties(
    fusedamp_classes
    PROPERTIES POSITION_INDEPENDENT_CODE ON
               UNITY_BUILD ON # reads torch's headers once
               UNITY_BUILD_BATCH_SIZE 0
               CXX_CLANG_TIDY ""
               CXX_CPPCHECK ""
               CXX_CPPLINT ""
               CXX_INCLUDE_WHAT_YOU_USE "")
endfunction()

# Makes the target. `problem` says what is missing; empty if nothing is.
function(_fusedamp_make_target problem)
  get_filename_component(package "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
  set(headers "${package}/include")
  if(NOT EXISTS "${headers}") # a source checkout, or an editable install of it
    get_filename_component(headers "${package}/../../csrc/include" ABSOLUTE)
  endif()
  set(ops "${package}/libfusedamp_cpu.so")
  if(NOT EXISTS "${ops}")
    set(${problem} "fusedamp is not built: ${ops} is missing. Run `pip install .` in its source folder." PARENT_SCOPE)
    return()
  endif()

  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  list(FIND languages CXX cxx)
  if(cxx EQUAL -1)
    set(${problem}
        "C++ is not enabled, with which fusedamp's classes are compiled. Add CXX to the languages in project(), or \
call enable_language(CXX) before find_package(fusedamp)."
        PARENT_SCOPE)
    return()
  endif()

  set(files "") # torch's libraries
  set(target "") # or a target of them
  set(has_cuda FALSE)
  if(TARGET torch)
    set(torch "the target torch")
    set(target torch)
    get_target_property(torch_headers torch INTERFACE_INCLUDE_DIRECTORIES)
    if(TARGET torch_cuda)
      set(has_cuda TRUE)
    endif()
  else()
    _fusedamp_find_torch("${package}" torch)
    if(NOT torch)
      set(where "CMAKE_PREFIX_PATH, and not next to ${package}")
      if(Torch_DIR)
        set(where "Torch_DIR (${Torch_DIR})")
      endif()
      set(${problem}
          "torch was not found in ${where}. Pass -DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; \
print(torch.utils.cmake_prefix_path)')\" or the folder of LibTorch, or call find_package(Torch) before \
find_package(fusedamp)."
          PARENT_SCOPE)
      return()
    endif()
    set(torch_headers "${torch}/include" "${torch}/include/torch/csrc/api/include")
    set(names torch torch_cpu c10)
    if(EXISTS "${torch}/lib/libtorch_cuda.so")
      set(has_cuda TRUE)
      list(APPEND names torch_cuda c10_cuda)
    endif()
    foreach(name IN LISTS names)
      list(APPEND files "${torch}/lib/lib${name}.so")
      if(NOT EXISTS "${torch}/lib/lib${name}.so")
        set(${problem}
            "torch in ${torch} has no lib/lib${name}.so. Call find_package(Torch) before \
find_package(fusedamp), or pass the folder of another torch in CMAKE_PREFIX_PATH."
            PARENT_SCOPE)
        return()
      endif()
    endforeach()
  endif()

  _fusedamp_read_torch("${torch_headers}" version standard)
  if(NOT version)
    set(${problem}
        "${torch} has no torch/headeronly/version.h in its include folders; expected the headers of torch \
2.11 or later."
        PARENT_SCOPE)
    return()
  elseif(version VERSION_LESS 2.11)
    set(${problem} "torch ${version} (${torch}) is too old; expected 2.11 or later." PARENT_SCOPE)
    return()
  endif()

  set(devices "CPU")
  if(has_cuda AND EXISTS "${package}/libfusedamp_cuda.so")
    set(devices "CPU and CUDA")
    list(APPEND ops "${package}/libfusedamp_cuda.so")
  elseif(has_cuda AND NOT fusedamp_FIND_QUIETLY)
    message(WARNING "fusedamp was built without CUDA kernels, and torch ${version} has CUDA: only CPU tensors work. "
                    "Install a fusedamp that was built with CUDA.")
  endif()
  include(FindPackageMessage)
  find_package_message(fusedamp "Found fusedamp: ${package} (version ${fusedamp_VERSION}, ${devices}), torch ${version}"
                       "[${package}][${torch}][${version}][${devices}]")

  # Ops are registered when a library is loaded, and fusedamp's libraries find torch's only if the program loads them.
  # So the linker must keep all, also those of which the program uses no symbol. It is one option because CMake drops
  # repetitions; it changes nothing for other libraries.
  list(PREPEND files ${ops})
  list(JOIN files "," kept)
  list(APPEND files ${target})
  _fusedamp_add_classes("${headers}" "${headers};${torch_headers}" "${standard}")
  add_library(fusedamp::fusedamp INTERFACE IMPORTED)
  set_target_properties(
    fusedamp::fusedamp
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${headers};${torch_headers}"
               INTERFACE_COMPILE_FEATURES "cxx_std_${standard}"
               INTERFACE_LINK_LIBRARIES "fusedamp_classes;${files}"
               INTERFACE_LINK_OPTIONS "LINKER:--push-state,--no-as-needed,${kept},--pop-state")
endfunction()

set(_fusedamp_problem "")
foreach(_fusedamp_component IN LISTS fusedamp_FIND_COMPONENTS)
  if(fusedamp_FIND_REQUIRED_${_fusedamp_component})
    set(_fusedamp_problem "fusedamp has no components; \"${_fusedamp_component}\" was asked for.")
  endif()
endforeach()
if(NOT _fusedamp_problem AND NOT TARGET fusedamp::fusedamp) # an earlier call may have made it
  _fusedamp_make_target(_fusedamp_problem)
endif()
if(_fusedamp_problem)
  set(fusedamp_FOUND FALSE)
  set(fusedamp_NOT_FOUND_MESSAGE "${_fusedamp_problem}")
endif()
