#pragma once
#include "../ops.h"

namespace pf {

#define PF_DECLARE(op, Args) void op(const Args&);
PF_OPS(PF_DECLARE)
#undef PF_DECLARE

const char* isa_name(int level);
int isa();                       // level in use: 0 base, 3 AVX2, 4 AVX-512
bool set_isa(const char* name);  // "" or nullptr: the best there is; false: unknown, or more than the processor has

}  // namespace pf
