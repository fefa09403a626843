/* Runs the script <own name>.sh beside it on the Linux side, with the same arguments, in the same folder: for programs
   of Windows 10 that wine lacks and Linux has. The script leaves what it says in <own name>.out, because a Linux program
   cannot write into a pipe of wine's, and at last its exit code in <own name>.rc, which tells that it has ended: wine
   does not wait for it. */
#include <process.h>
#include <stdio.h>
#include <string.h>
#include <windows.h>

static FILE *beside(char *path, const char *suffix) {
    strcpy(strrchr(path, '.'), suffix);
    return fopen(path, "r");
}

int main(int count, char **words) {
    char path[MAX_PATH];
    int code = 255, c;
    GetModuleFileNameA(NULL, path, sizeof path);
    strcpy(strrchr(path, '.'), ".sh");
    words[0] = path;
    _spawnv(_P_WAIT, path, (const char *const *)words);
    FILE *result = NULL;
    for (int i = 0; i < 3000 && !(result = beside(path, ".rc")); i++) Sleep(20);
    FILE *said = beside(path, ".out");
    while (said && (c = getc(said)) != EOF) putchar(c);
    if (!result || fscanf(result, "%d", &code) != 1) return 255;
    return code;
}
