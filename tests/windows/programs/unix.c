/* Runs the script <own name>.sh beside it on the Linux side, with the same arguments, in the same folder: for programs
   of Windows 10 that wine lacks and Linux has. The script leaves its exit code in <own name>.rc. */
#include <process.h>
#include <stdio.h>
#include <string.h>
#include <windows.h>

int main(int count, char **words) {
    char path[MAX_PATH];
    int code = 255;
    GetModuleFileNameA(NULL, path, sizeof path);
    strcpy(strrchr(path, '.'), ".sh");
    words[0] = path;
    _spawnv(_P_WAIT, path, (const char *const *)words);
    strcpy(strrchr(path, '.'), ".rc");
    FILE *result = fopen(path, "r");
    if (!result || fscanf(result, "%d", &code) != 1) code = 255;
    return code;
}
