# From the PVH entry to ring 3, for CPU 0 and for those that it starts.
#
# Everything that must run in ring 0 is here, and it is short: on a software-virtualised host every instruction of
# ring 0 is emulated, at about a microsecond each, and some are not emulated at all. Tables that would take many
# instructions to build are constants (page tables), or are written later from ring 3 (the interrupt descriptors).

.set CODE32, 0x08               # The selectors are those that Linux uses.
.set CODE, 0x10
.set DATA, 0x18
.set USER_DATA, 0x28 | 3
.set USER_CODE, 0x30 | 3
.set TSS, 0x40                  # One descriptor of 16 bytes a CPU from here.
.set GDT_LIMIT, 0x40 + 16 * {max_cpus} - 1

# A CPU's block (cpu.rs) holds: its TSS, followed by the I/O bitmap of 8192 zero bytes (every port is open) and the
# byte of ones that must end it; the ring-0 stack; the ring-3 stack up to the block's end.
.set IO_BITMAP, 0x68
.set IO_BITMAP_END, IO_BITMAP + 0x2000
.set RING0_STACK_TOP, 0x4000
.set BLOCK, {block}

.section .note.Xen, "a", @note
.balign 4
.long 4                         # Length of the name.
.long 8                         # Length of the entry's address.
.long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_start

.section .text.boot, "ax"

# PVH: 32-bit protected mode, flat segments, paging off, ebx = hvm_start_info.
.code32
.globl pvh_start
pvh_start:
    cld
    movl %ebx, {start_info}
    movl ${cpus}, %edi
    movl $TSS, %ebp

# edi = this CPU's block, ebp = its TSS selector.
enter_long_mode:
    lgdtl gdt_pointer
    movl $0x620, %eax           # PAE, and SSE's OSFXSR and OSXMMEXCPT.
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax      # PG, WP, NE, ET, MP, PE; caches on, no FPU emulation.
    movl %eax, %cr0
    ljmpl $CODE, $long_mode

.code64
long_mode:
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl $DATA, %eax
    movl %eax, %ss
    movl %edi, %edi             # The upper halves are undefined after the switch.
    movl %ebp, %ebp
    leaq RING0_STACK_TOP(%rdi), %rsp

    movq %rsp, 4(%rdi)          # TSS: the stack for entries into ring 0,
    movw $IO_BITMAP, 0x66(%rdi) # and the I/O bitmap.
    movb $0xff, IO_BITMAP_END(%rdi)

    movl %edi, %eax             # The descriptor of that TSS.
    movw $IO_BITMAP_END, gdt(%rbp)
    movw %ax, gdt + 2(%rbp)
    shrl $16, %eax
    movb %al, gdt + 4(%rbp)
    movb $0x89, gdt + 5(%rbp)
    movb %ah, gdt + 7(%rbp)
    ltr %bp
    lidt idt_pointer

    leaq BLOCK - 8(%rdi), %rax
    pushq $USER_DATA
    pushq %rax
    pushq $2                    # Interrupts off, and they stay off in ring 3.
    pushq $USER_CODE
    pushq ${ring3}              # ring3_start(block)
    iretq

# A CPU that was sent SIPI begins here in real mode, in a copy of this code below 1 MiB.
.code16
.globl ap_trampoline
ap_trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl {trampoline} + ap_gdt_pointer - ap_trampoline
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $CODE32, $ap_protected_mode
ap_gdt_pointer:
    .word GDT_LIMIT
    .long gdt
.globl ap_trampoline_end
ap_trampoline_end:

.code32
ap_protected_mode:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl {ap_block}, %edi
    movl {ap_selector}, %ebp
    jmp enter_long_mode

# Exceptions. None is expected, except one: HLT in ring 3 raises #GP, and is the way to sleep until an interrupt.
.code64
.balign 16
.globl exception_stubs
exception_stubs:
.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    .balign 16
    .if \vector == 13
    jmp general_protection
    .else
    .if !(\vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17 || \vector == 21 || \vector == 29 || \vector == 30)
    pushq $0                    # Where the CPU pushes no error code.
    .endif
    pushq $\vector
    jmp exception
    .endif
.endr

general_protection:
    pushq %rax
    cmpl $USER_CODE, 24(%rsp)
    jne 1f
    movq 16(%rsp), %rax
    cmpb $0xf4, (%rax)
    jne 1f
    popq %rax
    addq $8, %rsp
    incq (%rsp)                 # Go on behind the HLT.
    sti
    hlt
    cli
    iretq
1:
    popq %rax
    pushq $13

# On the stack: vector, error code, rip, cs, … There is no way back: ring 3 prints it, on a fresh stack.
exception:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq %rsp, %rax
    andq $-BLOCK, %rax          # Blocks are aligned to their size.
    leaq BLOCK - 8(%rax), %rax
    pushq $USER_DATA
    pushq %rax
    pushq $2
    pushq $USER_CODE
    pushq ${exception_report}   # exception_report(vector, error, rip, address)
    iretq

# Interrupts: each ends a HLT and does no more.
.globl pic_tick
pic_tick:
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq

.globl lapic_tick
lapic_tick:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
.globl spurious_interrupt
spurious_interrupt:
    iretq

.section .data.boot, "aw"
.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 0x08 ring 0, 32-bit code
    .quad 0x00af9b000000ffff    # 0x10 ring 0, 64-bit code
    .quad 0x00cf93000000ffff    # 0x18 ring 0, data
    .quad 0x00cffb000000ffff    # 0x20 ring 3, 32-bit code
    .quad 0x00cff3000000ffff    # 0x28 ring 3, data
    .quad 0x00affb000000ffff    # 0x30 ring 3, 64-bit code
    .quad 0
    .fill 2 * {max_cpus}, 8, 0  # 0x40 the CPUs' TSSs
gdt_pointer:
    .word GDT_LIMIT
    .long gdt
idt_pointer:
    .word 0xfff
    .quad {idt}

# Identity, 2 MiB pages; present, writable, user, and already accessed and dirty, so that no walk has to write them.
.balign 4096
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .set gib, 0
    .rept {mapped_gib}
    .quad page_directories + 0x27 + gib * 4096
    .set gib, gib + 1
    .endr
    .fill 512 - {mapped_gib}, 8, 0
page_directories:
    .set page, 0
    .rept {mapped_gib} * 512
    .if page == 0xfee00000
    .quad page + 0xf7           # The local APIC: uncached.
    .else
    .quad page + 0xe7
    .endif
    .set page, page + 0x200000
    .endr
