/* Everything that is compiled once for each kind of processor. */
#if defined(__GNUC__) && !defined(__clang__)
/* else GCC gives the limits in exponential() ways of their own through the loop, which is then no vector code */
#pragma GCC optimize("no-thread-jumps")
#endif
#include "attention.c"
#include "layers.c"
#include "matmul.c"
#include "decoder.c"
#include "quantize.c"
