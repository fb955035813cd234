// A plugin for QEMU's user mode emulation (TCG plugin API) that counts the instructions a program executes.
//
//   cc -O2 -shared -fPIC -DAPI=1 -o instructions.so instructions.c          API=2 from QEMU 9.0 on
//   qemu-aarch64 -plugin instructions.so,out=FILE program
//
// The program calls getppid() as a mark; at each mark the count so far is written to FILE, one a line.
// QEMU's header is not packaged everywhere, so what is used of it is declared here (include/qemu/qemu-plugin.h; these
// functions are the same from QEMU 5 to 10).
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define VISIBLE __attribute__((visibility("default")))

struct qemu_plugin_tb;
enum { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_vcpu_syscall_cb(uint64_t, void (*)(uint64_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

VISIBLE int qemu_plugin_version = API;

static uint64_t executed;
static int64_t mark = 173;  // getppid on ARM64
static FILE *out;

static void on_executed(unsigned cpu, void *instructions) {
  __atomic_fetch_add(&executed, (uintptr_t)instructions, __ATOMIC_RELAXED);
}

static void on_translated(uint64_t id, struct qemu_plugin_tb *block) {
  void *instructions = (void *)(uintptr_t)qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_cb(block, on_executed, QEMU_PLUGIN_CB_NO_REGS, instructions);
}

static void on_system_call(uint64_t id, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                           uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  if (number != mark) return;
  fprintf(out, "%" PRIu64 "\n", __atomic_load_n(&executed, __ATOMIC_RELAXED));
  fflush(out);
}

// `info` begins with the name of the emulated architecture.
VISIBLE int qemu_plugin_install(uint64_t id, const char *const *info, int argc, char **argv) {
  if (!strcmp(*info, "x86_64")) mark = 110;
  for (int i = 0; i < argc; i++)
    if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
  if (!out) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translated);
  qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
  return 0;
}
