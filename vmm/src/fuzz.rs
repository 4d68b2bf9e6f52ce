//! Entry points for the fuzz targets: what a guest can leave in its memory before it rings a doorbell, without a machine around it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use instar_guest_protocol::boot::{BootPage, DeviceFlags, VcpuArea};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::elf::{Elf, Segment};
use crate::layout::{BOOT_PAGE, IMAGE_START, Layout, PAGE, REQUEST, TABLES_START};
use crate::mail::Mail;
use crate::memory::GuestMemory;
use crate::stats::Counters;
use crate::virtio::{Device, DeviceTable, Part, Server};

/// Bytes of each granted file.
const FILE: u64 = 10_000;
/// What a file that may not be written is full of.
const FILL: u8 = 0x5a;
/// What lies where the guest may not write.
const CANARY: u64 = 0x0123_4567_89ab_cdef;
/// Bytes of the heap that each input begins with as zeroes.
const CLEARED: usize = 8 << 10;

/// A guest's memory and files, used by one input after the other.
pub struct Stage {
    memory: &'static GuestMemory,
    devices: DeviceTable,
    source: File,
    inputs: u64,
    /// Start of the heap, where inputs are put.
    pub heap: u64,
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

impl Stage {
    /// One page of code, one of data, 64 MiB; a file to be read, one to be written, a device to be written. None can grow, so that
    /// no input takes memory.
    pub fn new() -> Self {
        let segment =
            |start, write| Segment { start, end: start + PAGE, load_at: start, file: 0..0, write, execute: !write };
        let program =
            Elf { entry: IMAGE_START, segments: vec![segment(IMAGE_START, false), segment(IMAGE_START + PAGE, true)] };
        let layout = Layout::new(&program, 2, 64 << 20).expect("room for everything");
        let memory = Box::leak(Box::new(GuestMemory::new(&layout).expect("memory")));
        for at in [TABLES_START, IMAGE_START, REQUEST] {
            memory.write(at, &CANARY).expect("memory of the guest");
        }
        let source = file();
        source.write_all_at(&[FILL; FILE as usize], 0).expect("memory");
        let mut devices = DeviceTable::default();
        let read: OwnedFd = source.try_clone().expect("a descriptor").into();
        devices.push(Device::new(read, Part::whole(FILE), DeviceFlags::empty()));
        devices.push(Device::new(file().into(), Part::whole(FILE), DeviceFlags::WRITABLE));
        devices.push(Device::new(file().into(), Part::whole(FILE), DeviceFlags::WRITABLE | DeviceFlags::BLOCK_DEVICE));
        Self { memory, devices, source, inputs: 0, heap: layout.heap }
    }

    /// Puts bytes where the guest may put them.
    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.writable(at, bytes.len() as u64).expect("memory of the guest").copy_from(bytes);
    }

    fn clear(&self) {
        self.put(self.heap, &[0; CLEARED]);
    }

    /// Lets the monitor serve the queue that `words` describe, `kicks` times, with `heap` at the start of the heap.
    pub fn ring(&mut self, words: &[u8], heap: &[u8], kicks: usize) {
        let at = BOOT_PAGE + (std::mem::offset_of!(BootPage, vcpus) + std::mem::offset_of!(VcpuArea, transport)) as u64;
        self.clear();
        self.put(at, words);
        self.put(self.heap, heap);
        let mut server = Server::new(self.memory, at);
        for _ in 0..kicks {
            if server.kick(&self.devices, &Counters::default()).is_err() {
                break;
            }
        }
        self.judge_memory();
        self.inputs += 1;
        // It stays as it was made, so that it is enough to look now and then.
        if self.inputs.is_multiple_of(64) {
            self.judge_source();
        }
    }

    /// Lets the monitor take the message in the mailbox with these bytes, and answer it with as many as there is room for.
    pub fn mailbox(&mut self, mailbox: &[u8], heap: &[u8]) {
        let at = BOOT_PAGE + (std::mem::offset_of!(BootPage, vcpus) + std::mem::offset_of!(VcpuArea, mailbox)) as u64;
        self.put(self.heap, heap);
        self.put(at, mailbox);
        if let Ok(mail) = Mail::open(self.memory, at) {
            assert_eq!(mail.message().len() as u64, mail.message_len());
            // The mailbox may change meanwhile.
            self.put(at, &[0xff; 48]);
            let _ = mail.answer(&vec![0xa5; mail.room() as usize]);
        }
        self.judge_memory();
    }

    /// What lies in the heap.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.readable(self.heap + at, len as u64).expect("memory of the guest").copy_to(&mut bytes);
        bytes
    }

    fn judge_source(&self) {
        let mut bytes = [0; FILE as usize + 1];
        assert_eq!(self.source.read_at(&mut bytes, 0).expect("memory"), FILE as usize);
        assert!(bytes[..FILE as usize].iter().all(|byte| *byte == FILL), "a file granted for reading was written");
    }

    /// Nothing was written that may not be.
    fn judge_memory(&self) {
        for at in [TABLES_START, IMAGE_START, REQUEST] {
            assert_eq!(self.memory.read(at), Ok(CANARY), "memory that the guest may not write was written");
        }
    }
}

/// A file in memory that keeps its length.
fn file() -> File {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a file in memory");
    ftruncate(&file, FILE).expect("memory");
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK).expect("seals");
    let mut file = File::from(file);
    assert_eq!(file.read(&mut [0]).ok(), Some(1));
    file
}
