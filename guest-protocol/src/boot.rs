//! The boot page: everything that the guest must know at its first instruction.
//!
//! vCPU *n* starts at the ELF entry with `rdi = n`, `rsi =` address of the boot page and `rsp =` top of its stack (16-byte aligned).
//! Guest-virtual equals guest-physical wherever memory is mapped.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::limits::MAX_VCPUS;

/// [`BootPage::magic`]: "instarB\x01" in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"instarB\x01");

/// The boot page, at the start of the boot region (read and written by the guest).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootPage {
    /// [`MAGIC`].
    pub magic: u64,
    /// vCPUs that may run, 1..=[`MAX_VCPUS`].
    pub vcpu_count: u32,
    /// Granted files at the start: devices `0..device_count`.
    pub device_count: u32,
    /// Address of the request message.
    pub request_addr: u64,
    /// Its length, bytes.
    pub request_len: u64,
    /// Address of the heap, 2 MiB aligned.
    pub heap_addr: u64,
    /// Its length, bytes; memory behind it is used only as it is touched.
    pub heap_len: u64,
    /// Address of the log ring.
    pub log_addr: u64,
    /// Its length, bytes.
    pub log_len: u64,
    /// Counter of the [`WAIT`](crate::port::WAIT) and [`WAKE`](crate::port::WAKE) doorbells.
    pub epoch: u32,
    /// Bytes of the log ring in use, written by the guest.
    pub log_used: u32,
    /// Processor features that the monitor enabled: [`CpuFeatures`].
    pub cpu_features: u64,
    /// Table of `device_count` [`DeviceInfo`] (room for [`MAX_DEVICES`](crate::limits::MAX_DEVICES)).
    pub devices_addr: u64,
    /// Zero.
    pub reserved: [u64; 3],
    /// One area for each vCPU.
    pub vcpus: [VcpuArea; MAX_VCPUS],
}

/// Per-vCPU words.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuArea {
    /// The transport of this vCPU's request queue.
    pub transport: TransportWords,
    /// The mailbox of this vCPU.
    pub mailbox: Mailbox,
}

/// The shared-memory virtio transport: what other transports keep in device registers.
///
/// The guest writes the queue words, then `status` with `DRIVER_OK`. The monitor reads them once, at the first kick after that,
/// checks them and never looks again (a later change has no effect).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TransportWords {
    /// Feature bits that the device offers.
    pub device_features: u64,
    /// Feature bits that the driver accepted.
    pub driver_features: u64,
    /// virtio device status.
    pub status: u32,
    /// Largest queue size allowed.
    pub queue_max: u32,
    /// Queue size, a power of two.
    pub queue_size: u32,
    /// 1 once the queue is set up.
    pub queue_ready: u32,
    /// Address of the descriptor table.
    pub queue_desc: u64,
    /// Address of the driver area (available ring).
    pub queue_driver: u64,
    /// Address of the device area (used ring).
    pub queue_device: u64,
    /// Zero.
    pub reserved: u64,
}

/// One message to the monitor and its answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mailbox {
    /// Address of the message (a [`Call`](crate::message::Call)).
    pub message_addr: u64,
    /// Its length, bytes.
    pub message_len: u64,
    /// Where the answer goes.
    pub answer_addr: u64,
    /// Room for the answer, bytes; 0 if none is expected.
    pub answer_capacity: u64,
    /// Length of the answer, written by the monitor.
    pub answer_len: u64,
    /// Zero.
    pub reserved: u64,
}

/// What the monitor says about a granted file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// Length in bytes when it was granted.
    pub len: u64,
    /// Bytes of disk space that the file took when it was granted; all ones if nobody knows.
    pub allocated: u64,
    /// [`DeviceFlags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

bitflags::bitflags! {
    /// Properties of a granted file.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// Writes are allowed.
        const WRITABLE = 1 << 0;
        /// A block device: it can't grow, and a fresh one does not read as zero.
        const BLOCK_DEVICE = 1 << 1;
    }

    /// Processor features that the guest may use beyond baseline x86-64.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CpuFeatures: u64 {
        /// SSE4.2 (crc32).
        const SSE42 = 1 << 0;
        /// x86-64-v3 (AVX2, BMI2, FMA …), state saving enabled.
        const V3 = 1 << 1;
        /// AES-NI.
        const AES = 1 << 2;
    }
}

const _: () = {
    assert!(size_of::<TransportWords>() == 64);
    assert!(size_of::<Mailbox>() == 48);
    assert!(size_of::<VcpuArea>() == 112);
    assert!(size_of::<DeviceInfo>() == 24);
    assert!(size_of::<BootPage>() == 112 + 112 * MAX_VCPUS);
    assert!(size_of::<BootPage>() <= 4096);
};
