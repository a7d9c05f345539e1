/* What a library for Windows needs of a C runtime beside the system's ucrtbase.dll, when it is linked without one. */
#if defined(_WIN32) && defined(MOEC_NO_RUNTIME)

/* Called when the library is loaded and freed: there is nothing to set up. */
int DllMainCRTStartup(void *library, unsigned reason, void *reserved) {
  (void)library, (void)reason, (void)reserved;
  return 1;
}

/* Called with the bytes of a frame in rax before the stack grows by them: touches every page from the top downwards, since the
   system adds a page to the stack only when the one before it was touched. It changes no register. */
__asm__(
    ".globl ___chkstk_ms\n"
    "___chkstk_ms:\n"
    "  pushq %rax\n"
    "  pushq %rcx\n"
    "  leaq 24(%rsp), %rcx\n" /* the caller's stack pointer */
    "1: cmpq $4096, %rax\n"
    "  jb 2f\n"
    "  subq $4096, %rcx\n"
    "  orq $0, (%rcx)\n"
    "  subq $4096, %rax\n"
    "  jmp 1b\n"
    "2: subq %rax, %rcx\n"
    "  orq $0, (%rcx)\n"
    "  popq %rcx\n"
    "  popq %rax\n"
    "  ret\n");
#endif
typedef int moec_windows; /* a file of C is not empty */
