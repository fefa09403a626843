/* What nvidia-smi answers to system/torch_builds.py on a machine with the GPU that NVIDIA_SMI says; fails without. */
#include <stdio.h>
#include <stdlib.h>

int main(void) {
    const char *gpu = getenv("NVIDIA_SMI");
    if (!gpu) return 9;
    return puts(gpu) < 0;
}
