/* Copies of weights in huge pages.

   A model's weights are mapped from its file, in pages of 4 KB. Where the system has pages of 2 MB, the processor reads nearly
   twice as many bytes a second from them (17 and 33 GB/s on the machine that this was written on), since it neither looks up a
   page nor starts to fetch ahead anew every 4 KB. So a kernel's weights are copied when it runs first, by all threads at once, and
   the file's pages are given back: a session opens without reading the weights. Copies share blocks of memory, each freed when the
   last copy in it is. */
#include "host.h"

#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 1 << 21, BLOCK_BYTES = 32 << 20 };

typedef struct Block {
  struct Block *next;
  char *memory;
  size_t bytes, used;
  int copies;
} Block;

static Block *blocks;
static atomic_flag busy = ATOMIC_FLAG_INIT;

/* Return whether the system makes huge pages on request. */
static int has_huge_pages(void) {
  static const char *const path = "/sys/kernel/mm/transparent_hugepage/enabled";
  char text[64] = "";
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  size_t read = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  return read && !strstr(text, "[never]");
}

/* Return a block of at least `bytes` bytes of huge pages, or NULL. */
static Block *new_block(size_t bytes) {
  size_t size = (bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES) + PAGE - 1;
  Block *block = calloc(1, sizeof *block);
  size = size / PAGE * PAGE;
  char *memory = block ? mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
  if (memory == MAP_FAILED) return free(block), NULL;
  char *start = (char *)(((uintptr_t)memory + PAGE - 1) / PAGE * PAGE);
  if (start > memory) munmap(memory, (size_t)(start - memory));
  munmap(start + size, (size_t)(memory + PAGE - start));
  madvise(start, size, MADV_HUGEPAGE);
  *block = (Block){blocks, start, size, 0, 0};
  return blocks = block;
}

void release_pages(const void *data, size_t bytes) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[512];
  uintptr_t from = (uintptr_t)data, to = from + bytes;
  while (maps && fgets(line, sizeof line, maps)) {
    unsigned long start, end, inode = 0;
    char mode[8];
    if (sscanf(line, "%lx-%lx %7s %*s %*s %lu", &start, &end, mode, &inode) < 4 || end <= from || start > from) continue;
    if (inode && to <= end) { /* a file's, to which nobody writes: weights are constant */
      long page = sysconf(_SC_PAGESIZE);
      uintptr_t first = (from + (uintptr_t)page - 1) / (uintptr_t)page * (uintptr_t)page;
      if (first < to) madvise((void *)first, (to - first) / (uintptr_t)page * (uintptr_t)page, MADV_DONTNEED);
    }
    break;
  }
  if (maps) fclose(maps);
}

void *take_huge_pages(size_t bytes) {
  static atomic_int huge = -1;
  if (atomic_load(&huge) < 0) atomic_store(&huge, has_huge_pages());
  if (!bytes || !atomic_load(&huge)) return NULL;
  size_t size = (bytes + CHUNK - 1) / CHUNK * CHUNK;
  while (atomic_flag_test_and_set(&busy)) {
  }
  Block *block = blocks;
  while (block && block->bytes - block->used < size) block = block->next;
  if (!block) block = new_block(size);
  char *part = NULL;
  if (block) part = block->memory + block->used, block->used += size, block->copies++;
  atomic_flag_clear(&busy);
  return part;
}

void give_huge_pages(const void *copy) {
  if (!copy) return;
  while (atomic_flag_test_and_set(&busy)) {
  }
  for (Block **at = &blocks; *at; at = &(*at)->next) {
    Block *block = *at;
    if ((const char *)copy < block->memory || (const char *)copy >= block->memory + block->bytes) continue;
    if (!--block->copies) {
      *at = block->next;
      munmap(block->memory, block->bytes);
      free(block);
    }
    break;
  }
  atomic_flag_clear(&busy);
}
#else
void *take_huge_pages(size_t bytes) { return (void)bytes, NULL; }
void give_huge_pages(const void *part) { (void)part; }
void release_pages(const void *data, size_t bytes) { (void)data, (void)bytes; }
#endif
