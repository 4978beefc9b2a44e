/* AMX on CPUs without it: a library to preload that carries out tile instructions when
 * they raise SIGILL, and answers that Linux has allowed them.
 *
 * Faults are those of the hardware (Intel SDM, vol. 2): a bad configuration ends in
 * SIGSEGV, a tile that is not configured, or not as an instruction needs it, in SIGILL.
 *
 *   cc -shared -fPIC -O2 -ftls-model=initial-exec amx_emulator.c -o amx_emulator.so -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { N_TILES = 8, N_ROWS = 16, ROW_BYTES = 64, REQUEST_PERMISSION = 0x1023 };

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static __thread struct config config;
static __thread uint8_t tiles[N_TILES][N_ROWS][ROW_BYTES];

static const int REGISTERS[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

/* Ends the process as the kernel would. */
static int fault(int number) {
    signal(number, SIG_DFL);
    raise(number);
    return 0;
}

static int load_config(const struct config *given) {
    int i;
    if (given->palette == 0) {
        memset(&config, 0, sizeof config);
        return 1;
    }
    if (given->palette != 1) return fault(SIGSEGV);
    for (i = 0; i < 14; i++)
        if (given->reserved[i]) return fault(SIGSEGV);
    for (i = 0; i < 16; i++) {
        if (i >= N_TILES && (given->rows[i] || given->row_bytes[i])) return fault(SIGSEGV);
        if (given->rows[i] > N_ROWS || given->row_bytes[i] > ROW_BYTES) return fault(SIGSEGV);
        if (!given->rows[i] != !given->row_bytes[i]) return fault(SIGSEGV);
    }
    config = *given;
    memset(tiles, 0, sizeof tiles);
    return 1;
}

static int is_configured(int tile) {
    return config.palette == 1 && tile < N_TILES && config.rows[tile];
}

static int32_t value(uint8_t byte, int is_signed) {
    return is_signed ? (int8_t) byte : byte;
}

static float widened(const uint8_t *bfloat16) {
    uint32_t bits = (uint32_t) (bfloat16[0] | bfloat16[1] << 8) << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* C (M, N) += A (M, K) x B (K, N), in groups of 4 bytes (integers) or 2 (bfloat16). */
static int multiply(int c, int a, int b, int is_float, int a_signed, int b_signed) {
    int m, k, n, i, n_groups = config.row_bytes[a] / 4, n_columns = config.row_bytes[c] / 4;
    if (!is_configured(a) || !is_configured(b) || !is_configured(c) || a == b || b == c ||
        a == c || config.rows[c] != config.rows[a] || config.rows[b] != n_groups ||
        config.row_bytes[c] != config.row_bytes[b])
        return fault(SIGILL);
    for (m = 0; m < config.rows[c]; m++)
        for (n = 0; n < n_columns; n++) {
            uint8_t *at = &tiles[c][m][4 * n];
            int32_t sum;
            float real;
            memcpy(&sum, at, 4);
            memcpy(&real, at, 4);
            for (k = 0; k < n_groups; k++) {
                const uint8_t *left = &tiles[a][m][4 * k], *right = &tiles[b][k][4 * n];
                if (is_float)
                    for (i = 0; i < 4; i += 2) real += widened(left + i) * widened(right + i);
                else
                    for (i = 0; i < 4; i++)
                        sum += value(left[i], a_signed) * value(right[i], b_signed);
            }
            if (is_float) memcpy(at, &real, 4);
            else memcpy(at, &sum, 4);
        }
    return 1;
}

static int move(int tile, uint8_t *memory, int64_t stride, int is_store) {
    int row;
    if (!is_configured(tile)) return fault(SIGILL);
    if (!is_store) memset(tiles[tile], 0, sizeof tiles[tile]);
    for (row = 0; row < config.rows[tile]; row++) {
        uint8_t *at = memory + row * stride;
        if (is_store) memcpy(at, tiles[tile][row], config.row_bytes[tile]);
        else memcpy(tiles[tile][row], at, config.row_bytes[tile]);
    }
    return 1;
}

/* One instruction at `code`; its length, or 0 where it is none of AMX. */
static int step(const uint8_t *code, greg_t *registers) {
    int x, b, w, source, pp, opcode, mode, reg, rm, length = 5;
    uint8_t *address = 0;
    int64_t stride = 0;

    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2) return 0;
    x = !(code[1] & 0x40), b = !(code[1] & 0x20), w = code[2] >> 7;
    source = ~code[2] >> 3 & 15, pp = code[2] & 3, opcode = code[3];
    mode = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
    if (w || (opcode != 0x49 && opcode != 0x4B && opcode != 0x5E && opcode != 0x5C)) return 0;

    if (mode != 3) {
        int base = rm, has_base = 1;
        if (rm == 4) {
            int sib = code[length++], index = (sib >> 3 & 7) | x << 3;
            base = sib & 7;
            if (index != 4) stride = (int64_t) registers[REGISTERS[index]] << (sib >> 6);
            has_base = !(base == 5 && mode == 0);
        }
        if (has_base && !(rm == 5 && mode == 0))
            address = (uint8_t *) registers[REGISTERS[base | b << 3]];
        if (mode == 1) address += (int8_t) code[length], length += 1;
        else if (mode == 2 || !has_base || (rm == 5 && mode == 0)) {
            int32_t displacement;
            memcpy(&displacement, code + length, 4);
            address += displacement, length += 4;
            if (rm == 5 && mode == 0) address += (intptr_t) code + length;
        }
    }
    if (opcode == 0x5E && mode == 3)
        return multiply(reg, rm, source, 0, pp == 3 || pp == 2, pp == 3 || pp == 1) * length;
    if (opcode == 0x5C && mode == 3 && pp == 2)
        return multiply(reg, rm, source, 1, 0, 0) * length;
    if (opcode == 0x4B && mode != 3 && pp) return move(reg, address, stride, pp == 2) * length;
    if (opcode != 0x49) return 0;
    if (pp == 3 && mode == 3) {
        if (!is_configured(reg)) return fault(SIGILL);
        memset(tiles[reg], 0, sizeof tiles[reg]);
    } else if (pp == 1 && mode != 3)
        memcpy(address + stride, &config, sizeof config);
    else if (pp == 0 && mode == 3)
        memset(&config, 0, sizeof config);
    else if (pp == 0)
        return load_config((const struct config *) (address + stride)) * length;
    else
        return 0;
    return length;
}

static void on_illegal_instruction(int number, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *) context)->uc_mcontext.gregs;
    int length = step((const uint8_t *) registers[REG_RIP], registers);
    (void) information;
    if (length) registers[REG_RIP] += length;
    else signal(number, SIG_DFL); /* returns to the instruction, which ends the process */
}

typedef int sigaction_function(int, const struct sigaction *, struct sigaction *);

static int set_action(int number, const struct sigaction *new, struct sigaction *old) {
    return ((sigaction_function *) dlsym(RTLD_NEXT, "sigaction"))(number, new, old);
}

/* Nobody else handles SIGILL (Python's faulthandler would). */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
    return set_action(number, number == SIGILL ? 0 : new, old);
}

long syscall(long number, ...) {
    typedef long function(long, long, long, long, long, long, long);
    long a, b, c, d, e, f;
    va_list rest;
    va_start(rest, number);
    a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long);
    d = va_arg(rest, long), e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_arch_prctl && (int) a == REQUEST_PERMISSION) return 0;
    return ((function *) dlsym(RTLD_NEXT, "syscall"))(number, a, b, c, d, e, f);
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    set_action(SIGILL, &action, 0);
}
