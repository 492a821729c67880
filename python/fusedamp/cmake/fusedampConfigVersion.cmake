# The version is that of the headers. A request fits if it is not newer, and of the same major version; before 1.0, of
# the same minor version. A range says itself what fits.
set(_header "${CMAKE_CURRENT_LIST_DIR}/../include/fusedamp/version.h")
if(NOT EXISTS "${_header}") # a source checkout
  set(_header "${CMAKE_CURRENT_LIST_DIR}/../../../csrc/include/fusedamp/version.h")
endif()
file(STRINGS "${_header}" _line REGEX "^#define FUSEDAMP_VERSION ")
string(REGEX REPLACE ".*\"(.+)\".*" "\\1" PACKAGE_VERSION "${_line}")

set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(PACKAGE_FIND_VERSION_RANGE)
  if(NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MIN
     AND (PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX
          OR (PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION_MAX
              AND PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL "INCLUDE")))
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
  endif()
else()
  set(_series "^(0\\.[0-9]+|[0-9]+)")
  string(REGEX MATCH "${_series}" _mine "${PACKAGE_VERSION}")
  string(REGEX MATCH "${_series}" _asked "${PACKAGE_FIND_VERSION}")
  if(_mine STREQUAL _asked AND NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
  endif()
  if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()
