//! The virtual processor: which features it has, and its registers at the first instruction.
//!
//! It starts in 64-bit mode in ring 3 with interrupts off, no interrupt table, no descriptor table and no system calls: a
//! fault of any kind ends the machine, and no instruction leads to ring 0. The I/O permission bitmap of the task state lets it
//! write the ports of the doorbells, and no other. (I/O privilege level 3 would allow all of them, and is not kept by
//! hypervisors that run ring 3 natively.)

use std::arch::x86_64::__cpuid_count as host_cpuid;

use instar_guest_protocol::boot::CpuFeatures;
use instar_guest_protocol::port;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::KvmStep;
use crate::layout::{BOOT_PAGE, Layout, PAGE, TASK_STATE};
use crate::paging;

/// CPUID leaf 1, ECX.
const SSE3: u32 = 1 << 0;
const PCLMULQDQ: u32 = 1 << 1;
const SSSE3: u32 = 1 << 9;
const FMA: u32 = 1 << 12;
const CMPXCHG16B: u32 = 1 << 13;
const SSE4_1: u32 = 1 << 19;
const SSE4_2: u32 = 1 << 20;
const MOVBE: u32 = 1 << 22;
const POPCNT: u32 = 1 << 23;
const AES: u32 = 1 << 25;
const XSAVE: u32 = 1 << 26;
const OSXSAVE: u32 = 1 << 27;
const AVX: u32 = 1 << 28;
const F16C: u32 = 1 << 29;
/// CPUID leaf 1, EDX: FPU, TSC, MSR, PAE, CX8, PGE, CMOV, CLFSH, MMX, FXSR, SSE, SSE2.
const BASELINE: u32 =
    1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 15 | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26;
/// CPUID leaf 7, EBX.
const BMI1: u32 = 1 << 3;
const AVX2: u32 = 1 << 5;
const BMI2: u32 = 1 << 8;
const ERMS: u32 = 1 << 9;
/// CPUID leaf 7, EDX.
const FSRM: u32 = 1 << 4;
/// CPUID leaf 0x8000_0001, ECX.
const LZCNT: u32 = 1 << 5;
/// CPUID leaf 0x8000_0001, EDX: no-execute, long mode.
const NX_LM: u32 = 1 << 20 | 1 << 29;

/// XCR0: x87, SSE, AVX; and the bytes of their save area.
const XCR0_AVX: u64 = 7;
const XSAVE_AVX_BYTES: u32 = 832;

const V3_1: u32 = FMA | MOVBE | XSAVE | AVX | F16C | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | POPCNT | CMPXCHG16B;
const V3_7: u32 = BMI1 | AVX2 | BMI2;

const CR0: u64 = 0x8000_0033; // PG, NE, ET, MP, PE
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11; // LME, LMA, NXE; no SCE
const RFLAGS: u64 = 2; // the bit that is always set

/// Offset of the I/O permission bitmap in the task state, and where its own offset is kept.
const IO_BITMAP: u16 = 104;
const IO_BITMAP_OFFSET: usize = 102;
/// Doorbells: first port, and ports (four bytes each).
const DOORBELLS: std::ops::RangeInclusive<u16> = port::KICK..=port::PANIC + 3;
/// Bytes of the task state: up to the last doorbell's bit, and the byte that must follow.
const TASK_STATE_BYTES: usize = IO_BITMAP as usize + *DOORBELLS.end() as usize / 8 + 2;
const _: () = assert!(TASK_STATE_BYTES as u64 <= PAGE);

/// A processor description.
///
/// It holds what KVM itself must know to accept the registers, and no more: asking KVM for everything that it could offer
/// takes longer than the rest of the start, each leaf has its price as well, and the guest learns from its boot page what it
/// may use.
#[derive(Clone, Debug)]
pub struct Cpu {
    leaves: Vec<kvm_cpuid_entry2>,
    features: CpuFeatures,
}

impl Cpu {
    /// Describes the processor that this runs on, with vector registers beyond SSE if `vectors` and if it has them.
    pub fn of_host(vectors: bool) -> Self {
        let basic = host_cpuid(1, 0);
        let mut features = CpuFeatures::empty();
        features.set(CpuFeatures::SSE42, basic.ecx & (SSE4_2 | POPCNT) == SSE4_2 | POPCNT);
        features.set(CpuFeatures::AES, basic.ecx & (AES | PCLMULQDQ) == AES | PCLMULQDQ);
        let vendor = host_cpuid(0, 0);
        let [ebx, ecx, edx] = [vendor.ebx, vendor.ecx, vendor.edx];
        let mut leaves = vec![leaf(0, [1, ebx, ecx, edx]), leaf(0x8000_0001, [0, 0, 0, NX_LM])];
        if vectors && vendor.eax >= 13 && basic.ecx & (V3_1 | OSXSAVE) == V3_1 | OSXSAVE {
            let (more, extended) = (host_cpuid(7, 0), host_cpuid(0x8000_0001, 0));
            if more.ebx & V3_7 == V3_7 && extended.ecx & LZCNT != 0 {
                features |= CpuFeatures::V3;
                let ecx1 = V3_1 | OSXSAVE | (basic.ecx & (AES | PCLMULQDQ));
                leaves = vec![
                    leaf(0, [13, ebx, ecx, edx]),
                    // EBX: bytes flushed by clflush; the rest would be the APIC id.
                    leaf(1, [basic.eax, basic.ebx & 0xff00, ecx1, basic.edx & BASELINE]),
                    indexed(7, [0, more.ebx & (V3_7 | ERMS), 0, more.edx & FSRM]),
                    indexed(13, [XCR0_AVX as u32, XSAVE_AVX_BYTES, XSAVE_AVX_BYTES, 0]),
                    leaf(0x8000_0001, [0, 0, LZCNT, NX_LM]),
                ];
            }
        }
        Self { leaves, features }
    }

    /// What the guest is told on its boot page.
    pub fn features(&self) -> CpuFeatures {
        self.features
    }

    fn has_avx(&self) -> bool {
        self.features.contains(CpuFeatures::V3)
    }

    /// Makes vCPU `index` of `vm`, ready for its first instruction.
    pub fn create_vcpu(&self, vm: &VmFd, index: u32, layout: &Layout) -> Result<VcpuFd, (KvmStep, i32)> {
        let at = |step| move |error: kvm_ioctls::Error| (step, error.errno());
        let vcpu = vm.create_vcpu(u64::from(index)).map_err(at(KvmStep::CreateVcpu))?;
        let leaves = CpuId::from_entries(&self.leaves).map_err(|_| (KvmStep::Cpuid, libc::E2BIG))?;
        vcpu.set_cpuid2(&leaves).map_err(at(KvmStep::Cpuid))?;
        let mut special = vcpu.get_sregs().map_err(at(KvmStep::Registers))?;
        self.set_special(&mut special);
        vcpu.set_sregs(&special).map_err(at(KvmStep::Registers))?;
        if self.has_avx() {
            vcpu.set_xcrs(&xcr0(XCR0_AVX)).map_err(at(KvmStep::Xcrs))?;
        }
        vcpu.set_regs(&start_registers(index, layout)).map_err(at(KvmStep::Registers))?;
        Ok(vcpu)
    }

    fn set_special(&self, special: &mut kvm_sregs) {
        let code = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x0b,
            type_: 11, // execute, read, accessed
            present: 1,
            dpl: 3,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment { selector: 0x13, type_: 3, db: 1, l: 0, ..code };
        special.cs = code;
        (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
        special.tr = kvm_segment {
            base: TASK_STATE,
            limit: TASK_STATE_BYTES as u32 - 1,
            selector: 0x18,
            type_: 11, // busy 64-bit task state
            present: 1,
            ..kvm_segment::default()
        };
        special.cr0 = CR0;
        special.cr3 = paging::ROOT;
        special.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | if self.has_avx() { CR4_OSXSAVE } else { 0 };
        special.efer = EFER;
        special.idt.limit = 0;
        special.gdt.limit = 0;
    }
}

/// The task state: no stacks for other rings, and the ports of the doorbells.
pub fn task_state() -> [u8; TASK_STATE_BYTES] {
    let mut state = [0; TASK_STATE_BYTES];
    state[IO_BITMAP_OFFSET..][..2].copy_from_slice(&IO_BITMAP.to_le_bytes());
    let bitmap = &mut state[usize::from(IO_BITMAP)..];
    bitmap.fill(0xff);
    for port in DOORBELLS {
        bitmap[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    state
}

/// General registers at the first instruction: see [`instar_guest_protocol::boot`].
fn start_registers(index: u32, layout: &Layout) -> kvm_regs {
    kvm_regs {
        rip: layout.entry,
        rsp: layout.stack_top(index),
        rdi: u64::from(index),
        rsi: BOOT_PAGE,
        rflags: RFLAGS,
        ..kvm_regs::default()
    }
}

fn xcr0(value: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..kvm_xcr::default() };
    xcrs
}

fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

fn indexed(function: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..leaf(function, values) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_doorbells_are_allowed() {
        let state = task_state();
        let allowed: Vec<usize> =
            (0..(state.len() - 104) * 8).filter(|port| state[104 + port / 8] >> (port % 8) & 1 == 0).collect();
        assert_eq!(allowed, (0x5100..0x5120).collect::<Vec<_>>());
        assert_eq!(state.last(), Some(&0xff));
    }

    #[test]
    fn only_features_of_the_host() {
        let v3 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("movbe")
            && is_x86_feature_detected!("lzcnt");
        for vectors in [false, true] {
            let cpu = Cpu::of_host(vectors);
            assert_eq!(cpu.features().contains(CpuFeatures::SSE42), is_x86_feature_detected!("sse4.2"));
            assert_eq!(cpu.features().contains(CpuFeatures::V3), v3 && vectors);
            assert_eq!(cpu.leaves.iter().any(|l| l.function == 13), v3 && vectors);
            // No AVX-512.
            assert!(cpu.leaves.iter().filter(|l| l.function == 7).all(|l| l.ebx >> 16 & 1 == 0));
        }
    }
}
