// One translation unit per family of ops and instruction set: CMake compiles this file with PF_OP_BODIES, which
// includes the family's "<op>.inc", and PF_LEVEL. The target pragma comes after every standard header, so no shared
// inline function is compiled for a newer CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#if PF_X86
#include <immintrin.h>
#endif

#include "../ops.h"
#include "parallel.h"

#if PF_LEVEL == 4
#define PF_ISA v4
#define PF_VECTOR_BYTES 64
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#elif PF_LEVEL == 3
#define PF_ISA v3
#define PF_VECTOR_BYTES 32
#pragma GCC target("arch=x86-64-v3")
#else
#define PF_ISA base
#define PF_VECTOR_BYTES 16
#endif

#include "registers.h"
#include "vec.h"
#include "../math/number.h"
#include "../math/elementary.h"
#include "stream.h"
#include "convert.h"
#include "dtype.h"
#include PF_OP_BODIES
