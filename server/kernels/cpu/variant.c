/* Everything that is compiled once for each kind of processor. */
#include "attention.c"
#include "layers.c"
#include "matmul.c"
#include "quantize.c"
