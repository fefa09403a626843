/* A browser, as far as the program can tell: BROWSER names it. It writes the address into the file BROWSER_LOG. */
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **words) {
    FILE *log = fopen(getenv("BROWSER_LOG"), "a");
    if (!log) return 1;
    for (int i = 1; i < count; i++) fprintf(log, "%s\n", words[i]);
    return fclose(log);
}
