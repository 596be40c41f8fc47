//! A KVM guest's fault: from the touch until it goes on, by the guest's own clock.
//!
//! The machine is the least that can touch memory: one vCPU without any interrupt controller, put into ring 3 of long
//! mode at once (hosts without hardware virtualisation emulate ring 0), a few pages of code and page tables, and the
//! region that faults. It works for a while, reads the TSC before and after each touch and writes the difference down; a
//! write to an address where nothing is tells the host that a batch is done.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};

use super::region::{PAGE, Region};
use super::{FloorError, Samples};

/// The most pages that are touched in a batch.
pub const MOST_PAGES: usize = 512;

/// Guest-physical addresses; all are mapped at the same virtual ones.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD_LOW: u64 = 0x3000;
const PD_REGION: u64 = 0x4000;
const PD_SIGNAL: u64 = 0x5000;
const CODE: u64 = 0x8000;
const RESULTS: u64 = 0x10000;
const LOW_BYTES: usize = 0x2_0000;
/// The second gigabyte.
const REGION: u64 = 1 << 30;
/// The fourth gigabyte's first page, below every address that KVM itself uses: nothing is there.
const SIGNAL: u64 = 3 << 30;

/// Present, writable, for user mode, accessed, dirty.
const TABLE: u64 = 0x67;
/// The same, and a page of 2 MiB.
const LARGE: u64 = 0xe7;
const LARGE_BYTES: u64 = 2 << 20;

/// The guest's program. RSI walks the region, RDI the results, RCX counts; R10, R11 and R12 hold their first values, R9
/// the address of the signal, R13 the ticks to work before each touch.
const PROGRAM: &[u8] = &[
    0x4c, 0x89, 0xd6, // start: mov rsi, r10
    0x4c, 0x89, 0xdf, //        mov rdi, r11
    0x4c, 0x89, 0xe1, //        mov rcx, r12
    0x0f, 0x31, // next:        rdtsc
    0x48, 0xc1, 0xe2, 0x20, //  shl rdx, 32
    0x48, 0x09, 0xd0, //        or rax, rdx
    0x48, 0x89, 0xc3, //        mov rbx, rax
    0x0f, 0x31, // work:        rdtsc
    0x48, 0xc1, 0xe2, 0x20, //  shl rdx, 32
    0x48, 0x09, 0xd0, //        or rax, rdx
    0x49, 0x89, 0xc0, //        mov r8, rax
    0x48, 0x29, 0xd8, //        sub rax, rbx
    0x4c, 0x39, 0xe8, //        cmp rax, r13
    0x72, 0xec, //              jb work
    0x8a, 0x06, //              mov al, [rsi]
    0x0f, 0xae, 0xe8, //        lfence
    0x0f, 0x31, //              rdtsc
    0x48, 0xc1, 0xe2, 0x20, //  shl rdx, 32
    0x48, 0x09, 0xd0, //        or rax, rdx
    0x4c, 0x29, 0xc0, //        sub rax, r8
    0x48, 0x89, 0x07, //        mov [rdi], rax
    0x48, 0x83, 0xc7, 0x08, //  add rdi, 8
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
    0x48, 0xff, 0xc9, //        dec rcx
    0x75, 0xbc, //              jnz next
    0x41, 0x88, 0x01, //        mov [r9], al
    0xeb, 0xae, //              jmp start
];

/// Control register and EFER bits (Intel SDM vol. 3, 2.5 and 2.2.1).
const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_SCE_LME_LMA: u64 = 1 | 1 << 8 | 1 << 10;
/// The bit that is always set, and interrupts on, as every user program has them.
const RFLAGS: u64 = 1 << 1 | 1 << 9;

/// Lets a guest touch the region's pages one after the other, working so long before each, until `samples` wants no more.
///
/// # Errors
/// When the guest does not do what it should.
pub fn measure(guest: &mut Guest<'_>, mut samples: Samples) -> Result<Samples, FloorError> {
    while samples.wants_more() {
        guest.run_batch()?;
        (0..guest.pages).for_each(|page| samples.record(guest.result_ns(page)));
        guest.region.unmap_pages()?;
    }
    Ok(samples)
}

/// The vCPU goes first, then the machine, then the memory that both use.
pub struct Guest<'a> {
    vcpu: VcpuFd,
    _vm: VmFd,
    low: MmapRaw,
    tsc_khz: u64,
    pages: usize,
    region: &'a Region,
}

impl<'a> Guest<'a> {
    /// One that touches all pages of `region` in a batch, and works for `work_ns` before each touch.
    ///
    /// # Errors
    /// When KVM or memory cannot be had.
    pub fn new(region: &'a Region, work_ns: u64) -> Result<Self, FloorError> {
        let pages = (region.len() / PAGE).min(MOST_PAGES);
        let kvm = Kvm::new().map_err(FloorError::on("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(FloorError::on("create a virtual machine"))?;
        let low: MmapRaw =
            MmapOptions::new().len(LOW_BYTES).map_anon().map_err(FloorError::on("map memory for a guest"))?.into();
        for (slot, guest_phys_addr, base, bytes) in
            [(0, 0, low.as_mut_ptr(), LOW_BYTES), (1, REGION, region.base(), region.len())]
        {
            let memory = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr,
                memory_size: bytes as u64,
                userspace_addr: base as u64,
            };
            // SAFETY: both mappings are this long, and outlive the machine: `low` is dropped after it, and `region` is
            // borrowed for as long.
            unsafe { vm.set_user_memory_region(memory) }.map_err(FloorError::on("give a guest memory"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(FloorError::on("create a vCPU"))?;
        let tsc_khz = u64::from(vcpu.get_tsc_khz().map_err(FloorError::on("ask for the guest's TSC frequency"))?);
        if tsc_khz == 0 {
            return Err(FloorError::on("ask for the guest's TSC frequency")("it is 0"));
        }
        let guest = Self { vcpu, _vm: vm, low, tsc_khz, pages, region };
        guest.write_tables();
        guest.write(CODE, PROGRAM);
        guest.set_registers(work_ns.saturating_mul(tsc_khz) / 1_000_000)?;
        Ok(guest)
    }

    fn write_tables(&self) {
        let entry = |table: u64, index: u64, value: u64| self.write(table + index * 8, &value.to_le_bytes());
        entry(PML4, 0, PDPT | TABLE);
        for (gigabyte, directory) in [(0, PD_LOW), (REGION >> 30, PD_REGION), (SIGNAL >> 30, PD_SIGNAL)] {
            entry(PDPT, gigabyte, directory | TABLE);
            // One large page holds all that is there: the region is not longer.
            entry(directory, 0, (gigabyte << 30) | LARGE);
        }
        debug_assert!((MOST_PAGES * PAGE) as u64 <= LARGE_BYTES, "the region needs more than one large page");
    }

    fn set_registers(&self, work_ticks: u64) -> Result<(), FloorError> {
        let failed = FloorError::on("set a vCPU's registers");
        let mut special: kvm_sregs = self.vcpu.get_sregs().map_err(&failed)?;
        // Flat segments of ring 3; in long mode only their types count.
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 0x33,
            type_: 0xb,
            present: 1,
            dpl: 3,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x2b, type_: 0x3, l: 0, db: 1, ..code };
        special.cs = code;
        (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
        special.cr0 = CR0_PE_MP_ET_NE_WP_PG;
        special.cr3 = PML4;
        special.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
        special.efer = EFER_SCE_LME_LMA;
        self.vcpu.set_sregs(&special).map_err(&failed)?;
        let general = kvm_regs {
            rip: CODE,
            rflags: RFLAGS,
            r9: SIGNAL,
            r10: REGION,
            r11: RESULTS,
            r12: self.pages as u64,
            r13: work_ticks,
            ..Default::default()
        };
        self.vcpu.set_regs(&general).map_err(&failed)
    }

    /// Lets the guest touch every page once.
    ///
    /// # Errors
    /// When it leaves otherwise than by saying that it is done.
    pub fn run_batch(&mut self) -> Result<(), FloorError> {
        let failed = FloorError::on("run a guest");
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(SIGNAL, _)) => return Ok(()),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(FloorError::on("run a guest")(format!("it left by {other:?}"))),
                Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// How long the touch of `page` took.
    fn result_ns(&self, page: usize) -> u64 {
        let mut bytes = [0; 8];
        let offset = usize::try_from(RESULTS).unwrap_or(0) + page * 8;
        // SAFETY: `low` is a live mapping and RESULTS + 8 · MOST_PAGES lies within its length; the vCPU is not running, so
        // nobody writes meanwhile.
        unsafe { self.low.as_ptr().add(offset).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        // A kilohertz is a tick in a millisecond, which is 10^6 ns.
        u64::from_le_bytes(bytes).saturating_mul(1_000_000) / self.tsc_khz
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let offset = usize::try_from(address).unwrap_or(usize::MAX);
        assert!(offset <= LOW_BYTES && bytes.len() <= LOW_BYTES - offset, "{address:#x} lies outside low memory");
        // SAFETY: within the live mapping, as just checked; the guest does not run yet.
        unsafe { self.low.as_mut_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A jump's target: the byte behind it, and its distance.
    fn target(at: usize) -> usize {
        (at + 2).wrapping_add_signed(isize::from(i8::from_le_bytes([PROGRAM[at + 1]])))
    }

    #[test]
    fn the_programs_jumps_lead_where_they_say() {
        let jnz = PROGRAM.len() - 7;
        assert_eq!((PROGRAM[jnz], PROGRAM[PROGRAM.len() - 2]), (0x75, 0xeb));
        assert_eq!(target(jnz), 9, "next");
        let jb = PROGRAM.windows(2).position(|pair| pair == [0x72, 0xec]).unwrap();
        assert_eq!(target(jb), 21, "work");
        assert_eq!(target(PROGRAM.len() - 2), 0, "start");
    }

    #[test]
    fn results_fit_below_the_end_of_low_memory() {
        assert!(usize::try_from(RESULTS).unwrap() + MOST_PAGES * 8 <= LOW_BYTES);
    }
}
