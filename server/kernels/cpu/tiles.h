/* How a quantized matrix [rows][columns] lies in memory, so that a kernel reads it from front to end.

   Tiles of 16 rows, each cut into groups of 64 columns. In a group the same four columns of all 16 rows lie together, a
   quad: 64 bytes, one register.

   codes   8 bits: int8 [tiles][groups][16 quads][16 rows][4 columns]
           4 bits: uint8 [tiles][groups][8][16 rows][4 columns], quad q in the low and q + 8 in the high nibble of a
           byte, each an index into a table of 16 int8 values
   scales  4 bits: int8 [tiles][groups][16 rows], to be multiplied by row_scales float32 [tiles][16 rows]
           8 bits: float16 [tiles][groups][2 halves][16 rows], one scale for each 32 columns

   Columns beyond the matrix meet zeros of x; rows beyond it are computed and dropped. */
#pragma once

enum { GROUP = 64 };
