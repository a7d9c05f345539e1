/* What the splits of work follow from: how many processors there are, and how large their caches. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
__declspec(dllimport) unsigned long GetActiveProcessorCount(unsigned short group);
#endif

#include "host.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

/* Intel's processors and AMD's describe their caches alike, in leaves of different numbers. */
static void read_caches(int64_t caches[3]) {
  unsigned a, b, c, d, leaf = __get_cpuid_max(0x80000000u, NULL) >= 0x8000001du ? 0x8000001du : 4;
  if (leaf != 4 && __get_cpuid_count(leaf, 0, &a, &b, &c, &d) && !(a & 31)) leaf = 4;
  for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && a & 31; i++) {
    unsigned kind = a & 31, level = a >> 5 & 7;
    if (kind == 2 || level < 1 || level > 3) continue; /* 2: of instructions */
    caches[level - 1] = (int64_t)((b >> 22) + 1) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * ((int64_t)c + 1);
  }
}
#elif defined(__linux__)
static int read_text(int index, const char *name, char *text, int size) {
  char path[96];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, name);
  FILE *file = fopen(path, "r");
  int found = file && fgets(text, size, file);
  if (file) fclose(file);
  return found;
}

static void read_caches(int64_t caches[3]) {
  char text[32];
  int level, kilobytes;
  for (int i = 0; i < 8; i++) {
    if (read_text(i, "type", text, sizeof text) && text[0] == 'I') continue;
    if (!read_text(i, "level", text, sizeof text) || sscanf(text, "%d", &level) != 1 || level < 1 || level > 3) continue;
    if (read_text(i, "size", text, sizeof text) && sscanf(text, "%dK", &kilobytes) == 1) caches[level - 1] = (int64_t)kilobytes << 10;
  }
}
#elif defined(__APPLE__)
static void read_caches(int64_t caches[3]) {
  static const char *const names[] = {"hw.perflevel0.l1dcachesize", "hw.perflevel0.l2cachesize"};
  for (int i = 0; i < 2; i++) {
    int64_t found = 0;
    size_t size = sizeof found;
    if (!sysctlbyname(names[i], &found, &size, NULL, 0) && found > 0) caches[i] = found;
  }
}
#else
static void read_caches(int64_t caches[3]) { (void)caches; }
#endif

static int count_processors(void) {
#if defined(__linux__)
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
#elif defined(__APPLE__)
  int count = 1;
  size_t size = sizeof count;
  return sysctlbyname("hw.physicalcpu", &count, &size, NULL, 0) ? 1 : count;
#elif defined(_WIN32)
  return (int)GetActiveProcessorCount(0xffff);
#else
  return 1;
#endif
}

const Processor *this_processor(void) {
  static Processor found;
  static atomic_flag reading = ATOMIC_FLAG_INIT;
  while (atomic_flag_test_and_set(&reading)) {
  }
  if (!found.count) {
    int count = count_processors();
    found = (Processor){count < 1 ? 1 : count, {32 << 10, 512 << 10, 0}}; /* caches of which nothing is told are taken to be small */
    read_caches(found.caches);
  }
  atomic_flag_clear(&reading);
  return &found;
}
