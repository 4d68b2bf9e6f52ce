//! The shared-memory transport: what device registers are elsewhere are words of the boot page, so that setting up a queue
//! costs no exit. Only the notification is one.

use core::ptr::NonNull;

use instar_guest_protocol::boot::TransportWords;
use instar_guest_protocol::port;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::doorbell;

/// The transport of one vCPU's queue.
#[derive(Debug)]
pub struct SharedTransport {
    words: NonNull<TransportWords>,
}

// SAFETY: the words belong to whoever owns this, and they may be accessed from any vCPU.
unsafe impl Send for SharedTransport {}

impl SharedTransport {
    /// # Safety
    /// `words` are transport words of the boot page that nobody else uses.
    pub unsafe fn new(words: NonNull<TransportWords>) -> Self {
        Self { words }
    }

    fn words(&self) -> TransportWords {
        // SAFETY: the words stay mapped, and the monitor writes them only while this vCPU rings (`new`).
        unsafe { self.words.as_ptr().read_volatile() }
    }

    fn update(&mut self, change: impl FnOnce(&mut TransportWords)) {
        let mut words = self.words();
        change(&mut words);
        // SAFETY: as above, and `&mut self` is the only user in this program.
        unsafe { self.words.as_ptr().write_volatile(words) }
    }
}

impl Transport for SharedTransport {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        self.words().device_features
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.update(|words| words.driver_features = driver_features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if queue == 0 { self.words().queue_max } else { 0 }
    }

    fn notify(&mut self, _queue: u16) {
        doorbell::ring(port::KICK, 0);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.words().status)
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.update(|words| words.status = status.bits());
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.update(|words| {
            words.queue_size = size;
            words.queue_desc = descriptors;
            words.queue_driver = driver_area;
            words.queue_device = device_area;
            words.queue_ready = 1;
        });
    }

    fn queue_unset(&mut self, _queue: u16) {
        self.update(|words| words.queue_ready = 0);
    }

    fn queue_used(&mut self, _queue: u16) -> bool {
        self.words().queue_ready != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, _offset: usize) -> Result<T> {
        Err(Error::ConfigSpaceMissing)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _offset: usize, _value: T) -> Result<()> {
        Err(Error::ConfigSpaceMissing)
    }
}
